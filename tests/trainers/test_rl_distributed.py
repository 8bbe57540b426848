"""Two gloo processes with DDP and with FSDP2 make the steps of one process, for every trainer."""

import pytest
import torch

from apt_model.rl import DPOTrainer, GRPOTrainer, RewardModelTrainer, RLHFTrainer
from support import processes
from support.tiny_models import random_pairs, tiny_llama
from support.trainer_checks import assert_same_parameters
from trainers.test_grpo_trainer import sampled, tiny_model
from trainers.test_reward_model import pairs, reward_model


def wrapped(model, wrap, *parts):
    """The model as it is, under DDP, or sharded by FSDP2, `parts` of it on their own."""
    if wrap is None:
        return model
    if wrap == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rows_of(rank):
    """Which of five rows a process has: uneven on purpose; all where there is one process."""
    return {None: slice(0, 5), 0: slice(0, 2), 1: slice(2, 5)}[rank]


def reward_steps(wrap, rank):
    model = reward_model(num_layers=2)
    model = wrapped(model, wrap, model.value_head)
    trainer = RewardModelTrainer(
        model, margin=0.1, gradient_accumulation_steps=2 if wrap else 1, learning_rate=0.01
    )
    batch = {k: v[rows_of(rank)] for k, v in pairs(pairs=5).items()}
    return model, [trainer.train_step(**batch) for _ in range(2)] + [trainer.eval_step(**batch)]


def grpo_steps(wrap, rank):
    policy, reference = tiny_model(0), tiny_model(1)
    policy = wrapped(policy, wrap, policy.lm_head)
    if wrap == "fsdp2":
        reference = wrapped(reference, wrap, reference.lm_head)
    trainer = GRPOTrainer(
        policy,
        config={"learning_rate": 0.01, "group_size": 2, "use_critic": True},
        ref_policy_model=reference,
        gradient_accumulation_steps=2 if wrap else 1,
    )
    rows = {None: slice(0, 10), 0: slice(0, 4), 1: slice(4, 10)}[rank]
    batch = {k: v[rows] for k, v in sampled(rows=10).items()}
    return policy, [trainer.train_step(**batch) for _ in range(3)]


def echo(prompts, masks, max_new_tokens, temperature):
    """Answers every prompt with itself backwards."""
    ids, real = torch.cat([prompts, prompts.flip(1)], 1), torch.cat([masks, masks.flip(1)], 1)
    return ids, real, torch.cat([0 * masks, masks.flip(1)], 1)


def share(ids, masks):
    return (ids * masks).double().sum(1) / 100


def rlhf_steps(wrap, rank):
    policy, reference = tiny_model(0), tiny_model(1)
    policy = wrapped(policy, wrap, policy.lm_head)
    if wrap == "fsdp2":
        reference = wrapped(reference, wrap, reference.lm_head)
    trainer = RLHFTrainer(
        policy,
        share,
        reference,
        config={"learning_rate": 0.01, "batch_size": 8},
        rollout=echo,
        gradient_accumulation_steps=2 if wrap else 1,
    )
    batch = sampled(rows=5)
    prompts, masks = (batch[name][rows_of(rank)] for name in ("responses", "response_masks"))
    metrics = [trainer.train_step(prompts, masks) for _ in range(2)]
    return policy, [*metrics, trainer.eval_step(prompts, masks)]


def sampled_steps(wrap, rank):
    """The likeliest responses of two rows, and steps on responses drawn by each process."""
    policy = tiny_llama()
    policy = wrapped(policy, wrap, policy.lm_head)
    trainer = GRPOTrainer(
        policy, share, config={"learning_rate": 0.0, "group_size": 2, "max_new_tokens": 5}
    )
    prompts = sampled(rows=2)["responses"]
    metrics = [trainer.eval_step(prompts)]
    if rank is not None:
        torch.manual_seed(rank)
        drawn = [trainer.train_step_from_prompts(prompts) for _ in range(2)]
        assert all(step["response_length"] > 1 for step in drawn)
    return policy, metrics


def dpo_evaluation(wrap, rank):
    policy, reference = tiny_model(0), tiny_model(1)
    policy = wrapped(policy, wrap, policy.lm_head)
    if wrap == "fsdp2":
        reference = wrapped(reference, wrap, reference.lm_head)
    batch = {k: v[rows_of(rank)] for k, v in random_pairs(pairs=5).items()}
    return policy, [DPOTrainer(policy, reference).eval_step(**batch)]


def tied_steps(wrap, rank):
    """The embedding is the output layer: its gradient has two sources."""
    policy, reference = tiny_llama(tie_word_embeddings=True), tiny_llama(1)
    policy = wrapped(policy, wrap)
    if wrap == "fsdp2":
        reference = wrapped(reference, wrap)
    trainer = DPOTrainer(
        policy,
        reference,
        config={"learning_rate": 0.01},
        gradient_accumulation_steps=2 if wrap else 1,
    )
    batch = {k: v[rows_of(rank)] for k, v in random_pairs(pairs=5).items()}
    return policy, [trainer.train_step(**batch) for _ in range(3)]


RUNS = {
    "sampled": sampled_steps, "rlhf": rlhf_steps, "reward": reward_steps, "grpo": grpo_steps,
    "dpo": dpo_evaluation, "tied": tied_steps,
}  # fmt: skip


def run_all(rank, folder):
    results = {}
    for wrap in ("ddp", "fsdp2"):
        for name, run in RUNS.items():
            model, metrics = run(wrap, rank)
            parameters = {
                name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
                for name, p in model.named_parameters()
            }
            results[f"{name} {wrap}"] = {"metrics": metrics, "parameters": parameters}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes.run(run_all, folder, arguments=(str(folder),))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(results, name, wrap):
    model, expected = RUNS[name](None, None)
    result = results[f"{name} {wrap}"]
    for metrics, of_one in zip(result["metrics"], expected, strict=True):
        assert metrics == pytest.approx(of_one, abs=1e-9)
    assert_same_parameters(model, result["parameters"], 1e-9)


def accelerated_reward(prepare):
    model, optimizer = prepare(*with_adamw(reward_model()))
    return RewardModelTrainer(model, optimizer), lambda t: t.train_step(**pairs())


def accelerated_dpo(prepare):
    policy, optimizer = prepare(*with_adamw(tiny_model()))
    return DPOTrainer(policy, tiny_model(1), optimizer), lambda t: t.train_step(**random_pairs())


def accelerated_grpo(prepare):
    policy, optimizer = prepare(*with_adamw(tiny_model()))
    config = {"use_critic": True, "group_size": 2}
    trainer = GRPOTrainer(policy, None, optimizer, config, ref_policy_model="copy")
    return trainer, lambda t: t.train_step(**sampled())


def accelerated_rlhf(prepare):
    policy, optimizer = prepare(*with_adamw(tiny_model()))
    trainer = RLHFTrainer(policy, share, None, optimizer, rollout=echo)
    return trainer, lambda t: t.train_step(sampled()["responses"])


def with_adamw(model):
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "make", [accelerated_reward, accelerated_dpo, accelerated_grpo, accelerated_rlhf]
)
def test_models_and_optimizers_prepared_by_accelerate(make):
    from accelerate import Accelerator

    runs = []
    for prepare in (Accelerator(cpu=True).prepare, lambda *a: a):
        trainer, step = make(prepare)
        torch.manual_seed(0)
        runs.append([step(trainer) for _ in range(3)])
        trainer.load_state_dict(trainer.state_dict())
    assert runs[0] == runs[1] and runs[0][0] != runs[0][2]
