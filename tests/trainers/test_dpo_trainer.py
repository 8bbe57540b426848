"""The DPO trainer against the paper's loss written out here, and what its contract promises."""

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import dpo_loss, sequence_logps
from apt_model.rl import DPOConfig, DPOTrainer, create_dpo_trainer
from apt_model.rl.pair_batch import make_pair_batch
from support import processes
from support.tiny_models import (
    VOCABULARY,
    TinyCausalModel,
    TinyModelWithHead,
    as_output,
    parameters_of,
    random_pairs,
    tiny_llama,
)

LEARNING_RATE = 1e-2
METRICS = ["loss", "chosen_reward", "rejected_reward", "reward_margin", "accuracy"]


def tiny_model(seed=0, kind=TinyModelWithHead, **options):
    torch.manual_seed(seed)
    return kind(**options).double()


def logits_in(output):
    if isinstance(output, dict):
        return output["logits"]
    return output if isinstance(output, torch.Tensor) else output.logits


def paper_answer_logps(model, ids, mask, prompt_lengths):
    """log pi(answer | prompt), token by token: the definition, one sequence at a time."""
    sums = []
    for row, real, prompt in zip(ids, mask, prompt_lengths, strict=True):
        row = row[real.bool()]
        logits = logits_in(model(row[None]))
        log_probs = F.log_softmax(logits[0], dim=-1)
        steps = [log_probs[t - 1, row[t]] for t in range(max(int(prompt), 1), len(row))]
        sums.append(torch.stack(steps).sum() if steps else log_probs.sum() * 0)
    return torch.stack(sums)


def paper_loss(policy, reference, batch, beta=0.1):
    """Rafailov et al. 2023, equation 7."""
    sides = []
    for side in ("chosen", "rejected"):
        args = batch[f"{side}_ids"], batch[f"{side}_mask"], batch["prompt_lengths"]
        with torch.no_grad():
            reference_logps = paper_answer_logps(reference, *args)
        sides.append(paper_answer_logps(policy, *args) - reference_logps)
    chosen, rejected = sides
    return -F.logsigmoid(beta * (chosen - rejected)).mean(), chosen, rejected


def assert_same_parameters(module, expected, tolerance=0.0):
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )


MODELS = {
    "llama": tiny_llama,
    "bare logits": lambda: tiny_model(kind=TinyCausalModel),
    ".logits": lambda: tiny_model(kind=TinyCausalModel, answer=as_output),
    "dict": lambda: tiny_model(answer=lambda logits: {"logits": logits}),
    "head": tiny_model,
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_paper_in_plain_pytorch(name):
    policy = MODELS[name]()
    plain, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE, weight_decay=0)
    trainer = create_dpo_trainer(policy, learning_rate=LEARNING_RATE, beta=0.3)
    for step in range(3):
        batch = random_pairs(seed=step)
        loss, chosen, rejected = paper_loss(plain, reference, batch, beta=0.3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        metrics = trainer.train_step(**batch)
        assert list(metrics) == METRICS and all(type(v) is float for v in metrics.values())
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["chosen_reward"] == pytest.approx(0.3 * chosen.mean().item(), abs=1e-9)
        assert metrics["rejected_reward"] == pytest.approx(0.3 * rejected.mean().item(), abs=1e-9)
        margin = 0.3 * (chosen - rejected).mean().item()
        assert metrics["reward_margin"] == pytest.approx(margin, abs=1e-9)
        wins = (chosen > rejected).double().mean().item() if step else 0.5  # all ties at first
        assert metrics["accuracy"] == pytest.approx(wins)
    assert_same_parameters(policy, dict(plain.named_parameters()), 1e-9)
    assert trainer._policy.uses_hidden_states == (name in ("llama", "head", "dict"))
    assert trainer.get_statistics() == {
        "total_steps": 3,
        "mean_chosen_reward": metrics["chosen_reward"],
        "mean_rejected_reward": metrics["rejected_reward"],
        "accuracy": metrics["accuracy"],
    }
    trainer.get_statistics()["total_steps"] = 100
    assert trainer.get_statistics()["total_steps"] == 3


def test_without_prompt_lengths_every_token_but_the_first_counts():
    policy, reference = tiny_llama(0), tiny_llama(1)
    batch = random_pairs()
    trainer = DPOTrainer(policy, reference)
    loss, metrics = trainer.compute_dpo_loss(
        **{k: v for k, v in batch.items() if k != "prompt_lengths"}
    )
    expected = paper_loss(policy, reference, {**batch, "prompt_lengths": torch.ones(4)})[0]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["llama", "bare logits"])
def test_get_log_probs(name):
    model = MODELS[name]()
    trainer = DPOTrainer(model)
    batch = random_pairs()
    ids, mask = batch["chosen_ids"], batch["chosen_mask"]
    logits = logits_in(model(ids, attention_mask=mask))
    expected = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    logps = trainer.get_log_probs(model, ids, mask)
    torch.testing.assert_close(logps, expected * mask[:, 1:], rtol=0, atol=1e-9)
    labels = ids.roll(1, 0).masked_fill(mask == 0, -100)
    expected = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids.roll(1, 0)[:, 1:, None])[..., 0]
    logps = trainer.get_log_probs(model, ids, mask, labels=labels)
    torch.testing.assert_close(logps, expected * mask[:, 1:], rtol=0, atol=1e-9)
    assert logps.requires_grad
    other = tiny_model(7)
    assert trainer.get_log_probs(other, ids).shape == (4, ids.shape[1] - 1)


# Masks and padding


def shifted_left(ids, mask, extra):
    """The same rows, padded on the left to `extra` columns more, with other padding."""
    padded = torch.full((len(ids), ids.shape[1] + extra), 5)
    new_mask = torch.zeros_like(padded)
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        tokens = tokens[real.bool()]
        padded[row, len(padded[row]) - len(tokens) :] = tokens
        new_mask[row, len(padded[row]) - len(tokens) :] = 1
    return padded, new_mask


@pytest.mark.parametrize("name", ["llama", "bare logits"])
def test_side_and_length_of_the_padding_do_not_matter(name):
    model = MODELS[name]()
    trainer = DPOTrainer(model, copy.deepcopy(model), config={"beta": 0.5})
    with torch.no_grad():
        for parameter in trainer.ref_policy_model.parameters():
            parameter.mul_(0.9)
    batch = random_pairs()
    expected, _ = trainer.compute_dpo_loss(**batch)
    left = dict(batch)
    for side, extra in (("chosen", 0), ("rejected", 4)):
        left[f"{side}_ids"], left[f"{side}_mask"] = shifted_left(
            batch[f"{side}_ids"], batch[f"{side}_mask"], extra
        )
    right = dict(batch)
    right["chosen_ids"] = F.pad(batch["chosen_ids"], (0, 5), value=-100)  # ids of no vocabulary
    right["chosen_mask"] = F.pad(batch["chosen_mask"], (0, 5))
    for padded in (left, right):
        loss, _ = trainer.compute_dpo_loss(**padded)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        expected_grads = torch.autograd.grad(expected, model.parameters(), retain_graph=True)
        for ours, theirs in zip(
            torch.autograd.grad(loss, model.parameters()), expected_grads, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_loss_is_the_kernel_s():
    policy, reference, batch = tiny_llama(), tiny_llama(1), random_pairs()
    trainer = DPOTrainer(policy, reference)
    sides = {}
    for side in ("chosen", "rejected"):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
        counted = (mask * (torch.arange(ids.shape[1]) >= 3))[:, 1:].bool()
        for name, model in (("policy", policy), ("ref", reference)):
            logps = trainer.get_log_probs(model, ids, mask)
            summed = sequence_logps(logps, counted)
            sides[f"{name}_{side}_logps"] = summed.detach() if name == "ref" else summed
    expected, chosen, rejected = dpo_loss(**sides, beta=0.1)
    loss, metrics = trainer.compute_dpo_loss(**batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert metrics["chosen_reward"].item() == pytest.approx(chosen.mean().item(), abs=1e-12)
    assert metrics["rejected_reward"].item() == pytest.approx(rejected.mean().item(), abs=1e-12)


def test_the_order_of_the_pairs_does_not_matter():
    trainer, batch = DPOTrainer(tiny_llama(), tiny_llama(1)), random_pairs()
    mixed = {name: tensor[torch.tensor([2, 0, 3, 1])] for name, tensor in batch.items()}
    results = [trainer.eval_step(**each) for each in (batch, mixed)]
    assert results[0] == pytest.approx(results[1], abs=1e-12)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {
        "_".join(swap.get(part, part) for part in name.split("_")): tensor
        for name, tensor in batch.items()
    }
    other = trainer.eval_step(**swapped)
    assert other["reward_margin"] == pytest.approx(-results[0]["reward_margin"], abs=1e-12)
    assert other["loss"] != pytest.approx(results[0]["loss"], abs=1e-3)


def test_one_mask_without_the_other():
    trainer = DPOTrainer(tiny_llama(), tiny_llama(1))
    batch = random_pairs()
    full = {**batch, "rejected_mask": torch.ones_like(batch["rejected_mask"])}
    expected, _ = trainer.compute_dpo_loss(**full)
    loss, _ = trainer.compute_dpo_loss(**{**full, "rejected_mask": None})
    assert loss.item() == expected.item()
    no_masks = {**full, "chosen_mask": None, "rejected_mask": None}
    equal_widths = {**no_masks, "rejected_ids": batch["chosen_ids"].flip(0)}
    loss, _ = trainer.compute_dpo_loss(**equal_widths)
    ones = torch.ones_like(batch["chosen_ids"])
    expected, _ = trainer.compute_dpo_loss(
        **{**equal_widths, "chosen_mask": ones, "rejected_mask": ones}
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


def test_response_masks_equal_prompt_lengths():
    trainer = DPOTrainer(tiny_llama(), tiny_llama(1))
    batch = random_pairs()
    expected, _ = trainer.compute_dpo_loss(**batch)
    by_mask = {k: v for k, v in batch.items() if k != "prompt_lengths"}
    for side in ("chosen", "rejected"):
        mask = batch[f"{side}_mask"].bool().clone()
        mask[:, :3] = False
        by_mask[f"{side}_response_mask"] = mask
    assert trainer.compute_dpo_loss(**by_mask)[0].item() == expected.item()
    as_number = {**batch, "prompt_lengths": 3}
    assert trainer.compute_dpo_loss(**as_number)[0].item() == expected.item()
    del by_mask["rejected_response_mask"]  # the other side then counts from its second token
    sides = make_pair_batch(**by_mask).counted.sum(-1)
    assert torch.equal(sides[1], batch["rejected_mask"].sum(-1) - 1)
    assert torch.equal(sides[0], batch["chosen_mask"].sum(-1) - 3)


# Accumulation, resume, distribution


def test_micro_batches_equal_one_large_batch():
    batch = random_pairs(pairs=5, chosen=12)  # 5 pairs in 3 parts: sizes and lengths differ
    results = []
    for steps in (1, 3, 8):
        policy = tiny_llama()
        trainer = DPOTrainer(
            policy, tiny_llama(1), config={"learning_rate": 0.01}, gradient_accumulation_steps=steps
        )
        metrics = [trainer.train_step(**batch) for _ in range(2)][-1]
        results.append((metrics, parameters_of(policy), policy))
    for metrics, _, policy in results[1:]:
        assert_same_parameters(policy, results[0][1], 1e-10)
        assert metrics == pytest.approx(results[0][0], abs=1e-10)


def test_micro_batches_of_their_own_padding_equal_one_large_batch():
    batch = random_pairs(pairs=4)
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    longest = int(parts[0]["chosen_mask"].sum())
    parts[0]["chosen_ids"] = parts[0]["chosen_ids"][:, :longest]
    parts[0]["chosen_mask"] = parts[0]["chosen_mask"][:, :longest]
    one, cut = (
        DPOTrainer(tiny_llama(), tiny_llama(1), config={"learning_rate": 0.01}) for _ in range(2)
    )
    expected, metrics = one.train_step(**batch), cut.train_micro_batches(parts)
    assert metrics == pytest.approx(expected, abs=1e-10)
    assert_same_parameters(cut.policy_model, parameters_of(one.policy_model), 1e-10)


def make_resumable(seed):
    policy = tiny_model(seed, dropout=0.3)
    policy.embedding.requires_grad_(False)
    return create_dpo_trainer(
        policy,
        learning_rate=0.01,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    )


def test_a_resumed_run_is_bit_identical(tmp_path):
    trainer = make_resumable(0)
    torch.manual_seed(3)
    for step in range(2):
        trainer.train_step(**random_pairs(seed=step))
    in_memory = trainer.state_dict()
    torch.save(in_memory, tmp_path / "state.pt")
    never_stopped = [trainer.train_step(**random_pairs(seed=step)) for step in range(2, 5)]
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), in_memory):
        torch.manual_seed(99)
        resumed = make_resumable(1)
        resumed.load_state_dict(state)
        continued = [resumed.train_step(**random_pairs(seed=step)) for step in range(2, 5)]
        assert continued == never_stopped
        assert_same_parameters(resumed.policy_model, parameters_of(trainer.policy_model))
        for ours, theirs in zip(
            resumed.ref_policy_model.parameters(),
            trainer.ref_policy_model.parameters(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
        assert resumed.get_statistics() == trainer.get_statistics()
        assert resumed.curves.columns == trainer.curves.columns


def test_a_state_of_another_trainer_is_refused():
    state = make_resumable(0).state_dict()
    with pytest.raises(ValueError, match="scheduler"):
        create_dpo_trainer(make_resumable(0).policy_model).load_state_dict(state)
    trained_whole = create_dpo_trainer(tiny_model(), scheduler=make_scheduler)
    with pytest.raises(ValueError, match="another reference"):
        trained_whole.load_state_dict(state)


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def run_data_parallel(rank, folder, wrap):
    policy, reference = tiny_model(0), tiny_model(1)
    if wrap == "ddp":
        policy = torch.nn.parallel.DistributedDataParallel(policy)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for model in (policy, reference):
            fully_shard(model.lm_head, mesh=mesh)
            fully_shard(model, mesh=mesh)
    trainer = DPOTrainer(
        policy, reference, config={"learning_rate": 0.01}, gradient_accumulation_steps=2
    )
    batch = random_pairs(pairs=5)
    rows = slice(0, 2) if rank == 0 else slice(2, 5)  # uneven on purpose
    metrics = [trainer.train_step(**{k: v[rows] for k, v in batch.items()}) for _ in range(2)]
    assert trainer._policy.uses_hidden_states
    parameters = {
        name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in policy.named_parameters()
    }
    if rank == 0:
        torch.save({"metrics": metrics, "parameters": parameters}, f"{folder}/result.pt")


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, wrap):
    processes.run(run_data_parallel, tmp_path, arguments=(str(tmp_path), wrap))
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    trainer = DPOTrainer(tiny_model(0), tiny_model(1), config={"learning_rate": 0.01})
    batch = random_pairs(pairs=5)
    for metrics in result["metrics"]:
        assert metrics == pytest.approx(trainer.train_step(**batch), abs=1e-9)
    assert_same_parameters(trainer.policy_model, result["parameters"], 1e-9)


# The reference


def test_the_copy_stays_and_shares_what_is_frozen():
    policy = tiny_llama()
    policy.model.layers[0].requires_grad_(False)
    policy.model.embed_tokens.requires_grad_(False)
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    batch = random_pairs()
    before = trainer.compute_reference_logps(**batch)
    start = parameters_of(policy)
    trainer.train_step(**batch)
    for ours, expected in zip(trainer.compute_reference_logps(**batch), before, strict=True):
        assert torch.equal(ours, expected)
    for name, parameter in trainer.ref_policy_model.named_parameters():
        own = policy.get_parameter(name)
        assert (parameter.data_ptr() == own.data_ptr()) == (not own.requires_grad), name
        assert torch.equal(parameter, start[name]) and not parameter.requires_grad
        assert torch.equal(own, start[name]) == (not own.requires_grad), name
    policy.model.layers[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        trainer.train_step(**batch)


def test_the_policy_as_its_own_reference_is_an_error():
    policy = tiny_model()
    with pytest.raises(ValueError, match="policy itself"):
        create_dpo_trainer(policy, policy)
    with pytest.raises(ValueError, match="policy itself"):
        create_dpo_trainer(policy, torch.nn.Sequential(policy))


def test_precomputed_reference_logps():
    batches = [random_pairs(seed=step) for step in range(2)]
    with_model = create_dpo_trainer(tiny_model(), learning_rate=0.01)
    without = create_dpo_trainer(tiny_model(), learning_rate=0.01, precomputed_reference=True)
    assert without.ref_policy_model is None
    logps = [without.compute_reference_logps(**batch) for batch in batches]
    for batch, (chosen, rejected) in zip(batches, logps, strict=True):
        expected = with_model.train_step(**batch)
        given = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        assert without.train_step(**batch, **given) == pytest.approx(expected, abs=1e-12)
    assert_same_parameters(without.policy_model, parameters_of(with_model.policy_model), 1e-12)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        without.train_step(**batches[0])
    with pytest.raises(RuntimeError, match="no longer"):
        without.compute_reference_logps(**batches[0])


def test_without_a_reference():
    batch = random_pairs()
    policy = tiny_llama()
    plain = copy.deepcopy(policy)
    trainer = create_dpo_trainer(policy, reference_free=True)
    assert trainer.ref_policy_model is None
    logps = [
        paper_answer_logps(plain, batch[f"{s}_ids"], batch[f"{s}_mask"], batch["prompt_lengths"])
        for s in ("chosen", "rejected")
    ]
    expected = -F.logsigmoid(0.1 * (logps[0] - logps[1])).mean().item()
    assert trainer.train_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="no reference"):
        create_dpo_trainer(policy, plain, reference_free=True)
    with pytest.raises(ValueError, match="no reference"):
        trainer.train_step(**batch, ref_chosen_logps=logps[0], ref_rejected_logps=logps[1])


def test_length_normalised_types():
    batch = random_pairs()
    policy, reference = tiny_llama(), tiny_llama(1)
    means, ref_means = (
        [
            paper_answer_logps(
                model, batch[f"{s}_ids"], batch[f"{s}_mask"], batch["prompt_lengths"]
            ).detach()
            / (batch[f"{s}_mask"].sum(-1) - 3)
            for s in ("chosen", "rejected")
        ]
        for model in (policy, reference)
    )
    simpo = create_dpo_trainer(policy, loss_type="simpo", beta=2.0, simpo_gamma=0.3)
    expected = -F.logsigmoid(2.0 * (means[0] - means[1]) - 0.3).mean().item()
    assert simpo.eval_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)
    orpo = create_dpo_trainer(policy, loss_type="orpo", beta=0.2, sft_coef=1.0)
    odds = [mean - torch.log1p(-mean.exp()) for mean in means]
    expected = (-means[0] - 0.2 * F.logsigmoid(odds[0] - odds[1])).mean().item()
    assert orpo.eval_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)
    difference = (means[0] - ref_means[0]) - (means[1] - ref_means[1])
    for options in ({"loss_type": "sigmoid_norm"}, {"average_logps": True}):
        trainer = create_dpo_trainer(policy, reference, **options)
        expected = -F.logsigmoid(0.1 * difference).mean().item()
        assert trainer.eval_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)


def test_options_reach_the_loss():
    batch = random_pairs()
    policy, reference = tiny_llama(), tiny_llama(1)
    _, chosen, rejected = paper_loss(policy, reference, batch)
    d = (chosen - rejected).detach()
    smoothed = create_dpo_trainer(policy, reference, beta=0.2, label_smoothing=0.1)
    expected = (-0.9 * F.logsigmoid(0.2 * d) - 0.1 * F.logsigmoid(-0.2 * d)).mean().item()
    assert smoothed.eval_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)
    ipo = create_dpo_trainer(policy, reference, loss_type="ipo", beta=0.2)
    expected = ((d - 2.5) ** 2).mean().item()
    assert ipo.eval_step(**batch)["loss"] == pytest.approx(expected, abs=1e-9)


def test_eval_step_trains_nothing_and_restores_the_modes():
    policy = tiny_model(dropout=0.5)
    policy.mix.eval()
    trainer = create_dpo_trainer(policy)
    start = parameters_of(policy)
    first, second = (trainer.eval_step(**random_pairs()) for _ in range(2))
    assert first == second and first["loss"] == pytest.approx(0.6931471805599453)
    assert_same_parameters(policy, start)
    assert policy.training and policy.dropout.training and not policy.mix.training
    assert trainer.total_steps == 0


# Adapters


def lora(model, targets, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False, **options)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def test_a_disabled_adapter_is_the_reference():
    base = tiny_llama()
    plain = copy.deepcopy(base)
    torch.manual_seed(5)
    policy = lora(base, ["q_proj", "down_proj"], lora_dropout=0.2)
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    assert trainer.ref_policy_model is None and trainer._policy.uses_hidden_states
    batch = random_pairs()
    expected = [
        paper_answer_logps(plain, batch[f"{s}_ids"], batch[f"{s}_mask"], batch["prompt_lengths"])
        for s in ("chosen", "rejected")
    ]
    start = parameters_of(policy)
    for _ in range(2):
        trainer.train_step(**batch)
        for ours, theirs in zip(trainer.compute_reference_logps(**batch), expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora" not in name), name
    assert policy.training
    with pytest.raises(ValueError, match="policy itself"):
        create_dpo_trainer(policy, base)


def test_an_adapter_on_the_head_is_not_ignored():
    torch.manual_seed(5)
    policy = lora(tiny_llama(), ["lm_head"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = create_dpo_trainer(policy, learning_rate=0.01)
    assert "output embedding" in str(caught[0].message) and len(caught) == 1
    batch = random_pairs()
    with policy.disable_adapter():
        reference = copy.deepcopy(policy.get_base_model())
    merged = copy.deepcopy(policy).merge_and_unload()
    reference.lm_head = reference.lm_head.base_layer
    expected, _, _ = paper_loss(merged, reference, batch)
    assert trainer.train_step(**batch)["loss"] == pytest.approx(expected.item(), abs=1e-9)


# Refusals, before anything has changed


def with_nan(model):
    with torch.no_grad():
        model.mix.weight[0, 0] = torch.nan
    return model


def changed(batch, **values):
    return {**batch, **values}


BATCH = random_pairs()
ONE_MORE = torch.ones(4, 10)
REFUSED_BATCHES = {
    "chosen_mask": changed(BATCH, chosen_mask=ONE_MORE),
    "rejected_mask": changed(BATCH, rejected_mask=torch.ones(3, 7)),
    "chosen_response_mask": changed(BATCH, prompt_lengths=None, chosen_response_mask=ONE_MORE),
    "rejected_response_mask": changed(
        BATCH, prompt_lengths=None, rejected_response_mask=torch.ones(7)
    ),
    "prompt_lengths or response masks": changed(BATCH, chosen_response_mask=torch.ones(4, 9)),
    r"prompt_lengths must be an integer or \(4,\)": changed(BATCH, prompt_lengths=[1, 2]),
    "prompt_lengths must be an integer": changed(BATCH, prompt_lengths=torch.ones(4)),
    "rejected_ids must have 4 rows": changed(
        BATCH, rejected_ids=BATCH["rejected_ids"][:2], rejected_mask=None
    ),
    r"chosen_ids must be a tensor \(B, S\)": changed(BATCH, chosen_ids=BATCH["chosen_ids"][0]),
    "of integers": changed(BATCH, chosen_ids=BATCH["chosen_ids"].float()),
    "not empty": changed(
        BATCH,
        chosen_ids=torch.zeros(0, 9, dtype=torch.long),
        rejected_ids=torch.zeros(0, 7, dtype=torch.long),
    ),
    rf"\[0, {VOCABULARY}\).*got 0 to {VOCABULARY}": changed(
        BATCH,
        chosen_ids=BATCH["chosen_ids"].index_fill(1, torch.tensor([1]), VOCABULARY),
        rejected_ids=BATCH["rejected_ids"].index_fill(1, torch.tensor([0]), 0),
    ),
    "row 1 of chosen_ids has an empty response": changed(
        BATCH, prompt_lengths=torch.tensor([3, 9, 3, 3])
    ),
    "row 0 of rejected_ids has an empty response": changed(
        BATCH, rejected_mask=BATCH["rejected_mask"] * torch.tensor([[0], [1], [1], [1]])
    ),
    "ref_rejected_logps must be a tensor": changed(BATCH, ref_chosen_logps=torch.zeros(4)),
    "ref_chosen_logps must be a tensor": changed(
        BATCH, ref_chosen_logps=torch.zeros(3), ref_rejected_logps=torch.zeros(4)
    ),
}


@pytest.mark.parametrize("message", REFUSED_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(message):
    policy = tiny_model()
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    start = parameters_of(policy)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**REFUSED_BATCHES[message])
    assert_same_parameters(policy, start)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


def test_ids_beyond_the_vocabulary_of_a_model_that_shows_none():
    policy = tiny_model(kind=TinyCausalModel)
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    start = parameters_of(policy)
    ids = BATCH["chosen_ids"].clone()
    ids[0, 1] = VOCABULARY
    with pytest.raises((ValueError, IndexError)):
        trainer.train_step(**changed(BATCH, chosen_ids=ids))
    assert_same_parameters(policy, start)


def test_a_loss_that_is_not_finite_is_refused():
    policy = tiny_model()
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    trainer.train_step(**BATCH)
    with_nan(policy)
    start = parameters_of(policy)
    state = trainer.state_dict()["optimizer"]["state"]
    with pytest.raises(FloatingPointError, match=r"step 2 .*nan"):
        trainer.train_step(**BATCH)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name], rtol=0, atol=0, equal_nan=True)
        assert parameter.grad is None
    for index, values in trainer.state_dict()["optimizer"]["state"].items():
        assert all(torch.equal(v, state[index][k]) for k, v in values.items())
    assert trainer.total_steps == 1


@pytest.mark.parametrize("kind", [TinyCausalModel, TinyModelWithHead])
def test_a_reference_of_another_vocabulary_is_refused(kind):
    policy = tiny_model(kind=kind)
    start = parameters_of(policy)
    with pytest.raises(ValueError, match=f"vocabulary of {VOCABULARY + 1}|of {VOCABULARY} tokens"):
        trainer = create_dpo_trainer(
            policy, tiny_model(kind=kind, vocabulary=VOCABULARY + 1), learning_rate=0.01
        )
        trainer.train_step(**BATCH)
    assert_same_parameters(policy, start)


def test_a_policy_that_returns_no_logits_is_refused():
    policy = tiny_model(kind=TinyCausalModel, answer=lambda logits: (logits,))
    with pytest.raises(TypeError, match="must return logits"):
        create_dpo_trainer(policy).train_step(**BATCH)


CONFIG_ERRORS = [
    ({"beta": 0}, "beta"),
    ({"beta": -0.1}, "beta"),
    ({"beta": float("nan")}, "beta"),
    ({"beta": "0.1"}, "beta"),
    ({"beta": True}, "beta"),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    ({"label_smoothing": 1.0}, "label_smoothing"),
    ({"label_smoothing": 0.5, "loss_type": "robust"}, "label_smoothing"),
    ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing"),
    ({"learning_rate": -1e-6}, "learning_rate"),
    ({"learning_rate": float("inf")}, "learning_rate"),
    ({"max_grad_norm": 0}, "max_grad_norm"),
    ({"weight_decay": -1}, "weight_decay"),
    ({"sft_coef": -1}, "sft_coef"),
    ({"reference_free": "yes"}, "reference_free"),
    ({"average_logps": 1}, "average_logps"),
    ({"average_logps": True, "loss_type": "sigmoid_norm"}, "average_logps"),
    ({"loss_type": "sigmoids"}, "loss_type"),
    ({"discopop_tau": 0.05}, "discopop_tau"),
    ({"simpo_gamma": 0.5}, "simpo_gamma"),
    ({"betta": 0.1}, r"'betta'.*beta, label_smoothing, learning_rate"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_ERRORS)
def test_impossible_options_are_refused_at_construction(options, message):
    policy = tiny_model()
    with pytest.raises(ValueError, match=message):
        DPOTrainer(policy, config=options)
    with pytest.raises(ValueError, match=message):
        create_dpo_trainer(policy, **options)
    if "betta" not in options:
        with pytest.raises(ValueError, match=message):
            DPOConfig(**options)
        config = DPOConfig()
        for name, value in options.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=message):
            DPOTrainer(policy, config=config)


def test_configurations_of_every_kind():
    policy = tiny_model()
    config = DPOConfig(beta=0.2)
    assert DPOTrainer(policy).config == DPOConfig()
    assert DPOTrainer(policy, config={"beta": 0.2}).config == config
    assert DPOTrainer(policy, config=config).config is config
    assert create_dpo_trainer(policy, None, config, label_smoothing=0.1).config == DPOConfig(
        beta=0.2, label_smoothing=0.1
    )
    assert DPOTrainer(policy, config=config, max_grad_norm=3.0).max_grad_norm == 3.0
    defaults = DPOConfig()
    assert (defaults.beta, defaults.label_smoothing, defaults.learning_rate) == (0.1, 0.0, 1e-6)
    assert (defaults.max_grad_norm, defaults.reference_free) == (1.0, False)
    with pytest.raises(TypeError, match="DPOConfig"):
        DPOTrainer(policy, config=[("beta", 0.1)])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "kto_pair"])
def test_losses_of_a_whole_batch_are_not_cut(loss_type):
    policy = tiny_model()
    with pytest.raises(ValueError, match=loss_type):
        create_dpo_trainer(policy, loss_type=loss_type, gradient_accumulation_steps=2)
    trainer = create_dpo_trainer(policy, loss_type=loss_type)
    with pytest.raises(ValueError, match=loss_type):
        trainer.train_micro_batches([BATCH, BATCH])
    assert trainer.train_step(**BATCH)["loss"] > 0


def test_attributes_that_scripts_read():
    policy, reference = tiny_model(), tiny_model(1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    trainer = DPOTrainer(policy, reference, optimizer, {"beta": 0.2}, "cpu")
    assert trainer.policy_model is policy and trainer.ref_policy_model is reference
    assert trainer.optimizer is optimizer and trainer.device == torch.device("cpu")
    assert not reference.training


def test_trainer_and_kernels_learn(tmp_path):
    """A preference that can be learned: the chosen answers hold other tokens than the rejected."""
    policy = tiny_llama()
    trainer = create_dpo_trainer(policy, learning_rate=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch(pairs):
        prompt = torch.randint(0, VOCABULARY, (pairs, 3), generator=generator)
        answers = [torch.randint(low, low + 30, (pairs, 6), generator=generator) for low in (0, 30)]
        return {
            f"{side}_ids": torch.cat([prompt, answer], dim=1)
            for side, answer in zip(("chosen", "rejected"), answers, strict=True)
        } | {"prompt_lengths": 3}

    held_out = batch(64)
    before = trainer.eval_step(**held_out)
    for _ in range(30):
        trainer.train_step(**batch(8))
    after = trainer.eval_step(**held_out)
    assert before["accuracy"] == 0.5
    assert after["accuracy"] > 0.9 and after["loss"] < before["loss"]
    trainer.plot_curves(os.fspath(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def half_frozen_llama(**options):
    policy = tiny_llama(layers=3, **options)
    policy.model.embed_tokens.requires_grad_(False)
    policy.model.layers[:2].requires_grad_(False)
    return policy


def count_calls(module):
    calls = []
    original = module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    return calls


def test_frozen_first_layers_run_once_for_policy_and_copy():
    policy, plain = half_frozen_llama(), half_frozen_llama()
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    given = create_dpo_trainer(plain, copy.deepcopy(plain), learning_rate=0.01)
    for step in range(3):
        skipped = count_calls(trainer.ref_policy_model.model.layers[0].mlp)
        run = count_calls(trainer.ref_policy_model.model.layers[2].mlp)
        assert trainer.train_step(**random_pairs(seed=step)) == given.train_step(
            **random_pairs(seed=step)
        )
    assert len(skipped) == 0 and len(run) == 1  # trusted from the third step at the latest
    assert_same_parameters(policy, parameters_of(plain))
    resumed = create_dpo_trainer(half_frozen_llama(), learning_rate=0.01)
    resumed.load_state_dict(trainer.state_dict())
    for step in range(3, 6):
        expected = trainer.train_step(**random_pairs(seed=step))
        assert resumed.train_step(**random_pairs(seed=step)) == expected


def test_first_layers_that_differ_in_training_are_not_shared(monkeypatch):
    policy = half_frozen_llama(attention_dropout=0.5)
    trainer = create_dpo_trainer(policy, learning_rate=0.01)
    batch = random_pairs()
    expected = trainer.compute_reference_logps(**batch)
    seen, loss = [], trainer._loss

    def spied(logps, ref_logps, counted):
        seen.append(ref_logps)
        return loss(logps, ref_logps, counted)

    monkeypatch.setattr(trainer, "_loss", spied)
    for _ in range(3):
        trainer.train_step(**batch)
    assert len(seen) == 3
    for reference in seen:
        torch.testing.assert_close(reference, torch.stack(expected), rtol=0, atol=1e-12)


def test_a_trained_embedding_is_never_shared():
    policy = tiny_llama(layers=3)
    policy.model.layers[:2].requires_grad_(False)
    trainer = create_dpo_trainer(policy, learning_rate=0.1)
    plain = create_dpo_trainer(tiny_llama(layers=3), tiny_llama(layers=3), learning_rate=0.1)
    plain.policy_model.model.layers[:2].requires_grad_(False)
    for step in range(3):
        expected = plain.train_step(**random_pairs(seed=step))
        assert trainer.train_step(**random_pairs(seed=step)) == pytest.approx(expected, abs=1e-12)


def test_shared_first_layers_in_evaluation():
    trainer = create_dpo_trainer(half_frozen_llama(), learning_rate=0.01)
    given = half_frozen_llama()
    given = create_dpo_trainer(given, copy.deepcopy(given), learning_rate=0.01)
    for step in range(3):
        batch = random_pairs(seed=step)
        trainer.train_step(**batch)
        given.train_step(**batch)
        calls = count_calls(trainer.ref_policy_model.model.layers[0].mlp)
        assert trainer.eval_step(**batch) == given.eval_step(**batch)
    assert not calls
