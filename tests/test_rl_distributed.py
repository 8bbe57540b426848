"""Two gloo processes with DDP and with FSDP2 make the steps of one process, for every trainer."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from apt_model.rl import GRPOTrainer, RewardModelTrainer, RLHFTrainer
from test_grpo_trainer import sampled, tiny_model
from test_reward_model import pairs, reward_model
from trainer_checks import assert_same_parameters


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
    return model, [trainer.train_step(**batch) for _ in range(2)]


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


def rlhf_steps(wrap, rank):
    policy, reference = tiny_model(0), tiny_model(1)
    policy = wrapped(policy, wrap, policy.lm_head)
    if wrap == "fsdp2":
        reference = wrapped(reference, wrap, reference.lm_head)
    trainer = RLHFTrainer(
        policy,
        lambda ids, masks: (ids * masks).double().sum(1) / 100,
        reference,
        config={"learning_rate": 0.01, "whiten_advantages": False, "batch_size": 8},
        rollout=echo,
        gradient_accumulation_steps=2 if wrap else 1,
    )
    batch = sampled(rows=5)
    prompts, masks = (batch[name][rows_of(rank)] for name in ("responses", "response_masks"))
    metrics = [trainer.train_step(prompts, masks) for _ in range(2)]
    for of_step in metrics:
        del of_step["explained_variance"]  # of each process, then averaged
    return policy, metrics


RUNS = {"rlhf": rlhf_steps, "reward": reward_steps, "grpo": grpo_steps}


def run_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
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
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(run_all, args=(str(folder),), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(results, name, wrap):
    model, expected = RUNS[name](None, None)
    result = results[f"{name} {wrap}"]
    for metrics, of_one in zip(result["metrics"], expected, strict=True):
        assert metrics == pytest.approx(of_one, abs=1e-9)
    assert_same_parameters(model, result["parameters"], 1e-9)


def test_models_and_optimizers_prepared_by_accelerate():
    from accelerate import Accelerator

    def steps(prepare):
        policy = tiny_model()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        policy, optimizer = prepare(policy, optimizer)
        config = {"use_critic": True, "group_size": 2}
        trainer = GRPOTrainer(policy, None, optimizer, config, ref_policy_model="copy")
        return [trainer.train_step(**sampled()) for _ in range(3)], trainer

    (ours, trainer), (expected, _) = steps(Accelerator(cpu=True).prepare), steps(lambda *a: a)
    assert ours == expected
    trainer.load_state_dict(trainer.state_dict())
