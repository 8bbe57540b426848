"""The GRPO trainer against DeepSeekMath's loss written out here, and what its contract promises."""

import copy

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import group_advantages, policy_loss
from apt_model.rl import GRPOConfig, GRPOTrainer, create_grpo_trainer
from apt_model.rl.reward_source import TextReward
from support.tiny_models import (
    VOCABULARY,
    TinyCausalModel,
    TinyModelWithHead,
    parameters_of,
    tiny_llama,
)
from support.trainer_checks import assert_same_parameters, halving, shifted_left

METRICS = [
    "group_variance", "mean_reward", "policy_loss", "kl_divergence", "mean_advantage", "total_loss",
]  # fmt: skip
PROMPT = 3


def tiny_model(seed=0, kind=TinyModelWithHead, **options):
    torch.manual_seed(seed)
    return kind(**options).double()


MODELS = {
    "llama": tiny_llama,
    "head": tiny_model,
    "bare logits": lambda seed=0: tiny_model(seed, TinyCausalModel),
}


def sampled(rows=8, width=9, seed=0):
    """Keyword arguments of a step: right-padded sequences of several lengths, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, width), generator=generator)
    lengths = torch.randint(PROMPT + 1, width + 1, (rows, 1), generator=generator)
    rewards = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = (torch.arange(width) < lengths).long()
    return {"responses": ids, "response_masks": mask, "rewards": rewards}


def logits_of(model, ids):
    output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def paper_logps(model, row, prompt=PROMPT):
    log_probs = F.log_softmax(logits_of(model, row[None])[0], -1)
    return torch.stack([log_probs[t - 1, row[t]] for t in range(prompt, len(row))])


def paper_advantages(rewards, size, kind="relative"):
    """Row by row, as the contract defines them."""
    advantages = []
    for group in rewards.split(size):
        for reward in group:
            if kind == "rank":
                rank = (group < reward).sum() + 0.5 * ((group == reward).sum() - 1)
                advantages.append((rank - (size - 1) / 2) / (size / 2))
            else:
                a = reward - group.mean()
                spread = group.std() if size > 1 else torch.tensor(0.0)
                equal = (group == group[0]).all()
                a = torch.zeros(()) if equal else a / (spread + 1e-8) if kind != "relative" else a
                advantages.append(a)
    return torch.stack(advantages).double()


def paper_loss(policy, reference, batch, size=4, kl_coef=0.1, clip=0.2, old=None, kind="relative"):
    """Shao et al. 2024, equations 3 and 4: the mean over responses of their means over tokens."""
    advantages = paper_advantages(batch["rewards"], size, kind)
    losses, kls = [], []
    for i, (ids, mask) in enumerate(zip(batch["responses"], batch["response_masks"], strict=True)):
        row = ids[mask.bool()]
        logps = paper_logps(policy, row)
        before = logps.detach() if old is None else old[i, PROMPT - 1 : len(row) - 1]
        ratio = torch.exp(logps - before)
        bounded = ratio.clamp(1 - clip, 1 + clip)
        loss = -torch.minimum(ratio * advantages[i], bounded * advantages[i])
        if reference is not None:
            with torch.no_grad():
                d = paper_logps(reference, row) - logps.detach()
            kls.append(torch.exp(d) - d - 1)
            d = d + logps.detach() - logps
            loss = loss + kl_coef * (torch.exp(d) - d - 1)
        losses.append(loss.mean())
    return torch.stack(losses).mean(), torch.cat(kls).mean() if kls else torch.zeros(())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["relative", "normalized", "rank"])
def test_steps_equal_the_paper_in_plain_pytorch(name, kind):
    policy, reference = MODELS[name](), MODELS[name](1)
    plain = copy.deepcopy(policy)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (policy, plain))
    trainer = GRPOTrainer(policy, None, ours, {"advantage_type": kind}, ref_policy_model=reference)
    for step in range(2):
        batch = sampled(seed=step)
        old = trainer.get_log_probs(policy, batch["responses"], batch["response_masks"]).detach()
        old = old + 0.3 * torch.randn_like(old)
        loss, kl = paper_loss(plain, reference, batch, old=old, kind=kind)
        theirs.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        metrics = trainer.train_step(**batch, old_log_probs=old, prompt_lengths=PROMPT)
        assert list(metrics) == METRICS and all(type(v) is float for v in metrics.values())
        assert metrics["total_loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["kl_divergence"] == pytest.approx(kl.item(), abs=1e-9)
        assert metrics["mean_reward"] == pytest.approx(batch["rewards"].mean().item(), abs=1e-12)
        variance = batch["rewards"].view(2, 4).var(1).mean().item()
        assert metrics["group_variance"] == pytest.approx(variance, abs=1e-12)
    assert_same_parameters(policy, dict(plain.named_parameters()), 1e-9)
    statistics = {k: metrics[k] for k in METRICS[:4]}
    assert trainer.get_statistics() == {"total_steps": 2, **statistics}


def test_the_first_update_has_a_ratio_of_one():
    policy = tiny_model()
    trainer = GRPOTrainer(policy)
    batch = sampled()
    old = trainer.get_log_probs(policy, batch["responses"], batch["response_masks"]).detach()
    advantages, _ = trainer.compute_group_advantages(batch["rewards"])
    arguments = batch["responses"], batch["response_masks"], advantages
    results = [trainer.compute_policy_loss(*arguments, old_log_probs=o) for o in (None, old)]
    (loss, metrics), (same, _) = results
    assert list(metrics) == ["policy_loss", "kl_divergence", "mean_advantage"]
    assert loss.item() == pytest.approx(same.item(), abs=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, policy.parameters()) for x, _ in results)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_loss_is_the_kernel_s():
    policy, reference, batch = tiny_llama(), tiny_llama(1), sampled()
    trainer = GRPOTrainer(policy, ref_policy_model=reference)
    ids, mask = batch["responses"], batch["response_masks"]
    logps = trainer.get_log_probs(policy, ids, mask)
    old = logps.detach() + 0.3 * torch.sin(torch.arange(logps.numel())).view_as(logps)
    advantages, _ = trainer.compute_group_advantages(batch["rewards"])
    counted = (mask * (torch.arange(ids.shape[1]) >= PROMPT))[:, 1:].bool()
    ref = trainer.get_log_probs(reference, ids, mask).detach()
    expected, measured = policy_loss(
        logps, old, advantages, counted, ref_logps=ref, kl_coef=0.1, aggregation="sequence_mean"
    )
    loss, metrics = trainer.compute_policy_loss(ids, mask, advantages, old, prompt_lengths=PROMPT)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert metrics["kl_divergence"].item() == pytest.approx(measured["ref_kl"].item(), abs=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, policy.parameters()) for x in (loss, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_order_of_the_groups_does_not_matter():
    batch, results = sampled(), []
    for rows in (torch.arange(8), torch.tensor([6, 4, 7, 5, 3, 0, 2, 1])):
        policy = tiny_model()
        trainer = GRPOTrainer(policy, config={"learning_rate": 0.01})
        metrics = trainer.train_step(**{name: tensor[rows] for name, tensor in batch.items()})
        results.append((metrics, parameters_of(policy)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert_same_parameters(policy, results[0][1], 1e-9)


def test_options_reach_the_loss():
    policy, batch = tiny_model(), sampled()
    for options in (
        {"aggregation": "token_mean"}, {"aggregation": "dr_grpo"}, {"aggregation": "token_sum"},
        {"ratio_level": "sequence"}, {"loss_type": "cispo"}, {"loss_type": "sapo"},
        {"clip_range": 0.01}, {"clip_high": 0.5}, {"entropy_coef": 0.1}, {"temperature": 2.0},
        {"loss_type": "reinforce"}, {"sampling_temperature": 2.0}, {"dual_clip": 1.001},
    ):  # fmt: skip
        losses = []
        for steps in (1, 3):
            trainer = GRPOTrainer(
                copy.deepcopy(policy), config=options, gradient_accumulation_steps=steps
            )
            logps = trainer.get_log_probs(trainer.policy_model, batch["responses"]).detach()
            noise = torch.linspace(-0.5, 0.5, logps.numel(), dtype=logps.dtype).view_as(logps)
            metrics = trainer.train_step(**batch, old_log_probs=logps + noise)
            losses.append((metrics, parameters_of(trainer.policy_model)))
        assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-10), options
        assert_same_parameters(trainer.policy_model, losses[0][1], 1e-10)
        default = GRPOTrainer(copy.deepcopy(policy)).train_step(
            **batch, old_log_probs=logps + noise
        )
        assert losses[0][0]["total_loss"] != pytest.approx(default["total_loss"], abs=1e-6), options


def test_dr_grpo_divides_by_a_constant():
    """Liu et al. 2025: by the responses' room, whatever the batch is padded to."""
    batch, steps = sampled(), []
    for columns in (0, 8):
        padded = {k: F.pad(v, (0, columns)) if v.dim() == 2 else v for k, v in batch.items()}
        policy = tiny_model()
        trainer = GRPOTrainer(
            policy, None, torch.optim.SGD(policy.parameters(), lr=0.1),
            {"aggregation": "dr_grpo", "max_new_tokens": 20, "max_grad_norm": None},
        )  # fmt: skip
        logps = trainer.get_log_probs(policy, padded["responses"], padded["response_masks"])
        old = (logps + 0.3).detach()
        metrics = trainer.train_step(**padded, old_log_probs=old, prompt_lengths=PROMPT)
        steps.append((metrics, parameters_of(policy)))
    assert steps[0][0] == pytest.approx(steps[1][0], abs=1e-9)
    assert_same_parameters(policy, steps[0][1], 1e-9)
    advantages = paper_advantages(batch["rewards"], 4, "relative")
    lengths = batch["response_masks"][:, PROMPT:].sum(1)
    ratio = torch.exp(torch.tensor(-0.3, dtype=torch.float64))
    terms = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * lengths
    assert steps[0][0]["policy_loss"] == pytest.approx(-terms.sum().item() / (8 * 20), abs=1e-9)


# Groups


@pytest.mark.parametrize("kind", ["relative", "normalized", "rank"])
def test_advantages(kind):
    trainer = GRPOTrainer(tiny_model(), config={"advantage_type": kind, "temperature": 2.0})
    rewards = torch.tensor([1.0, 3.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    advantages, metrics = trainer.compute_group_advantages(rewards)
    expected = paper_advantages(rewards, 4, kind) / 2.0
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-7)
    assert torch.equal(advantages, group_advantages(rewards, 4, kind) / 2.0)
    assert advantages[4:].abs().sum() == 0
    assert list(metrics) == ["group_variance", "mean_reward"]
    assert metrics["mean_reward"].item() == rewards.mean().item()
    assert metrics["group_variance"].item() == pytest.approx(rewards[:4].var().item() / 2)
    ones, metrics = trainer.compute_group_advantages(rewards, group_size=1)
    assert ones.abs().sum() == 0 and metrics["group_variance"] == 0
    pairs, _ = trainer.compute_group_advantages(rewards, group_size=2)
    expected = paper_advantages(rewards, 2, kind) / 2.0
    torch.testing.assert_close(pairs, expected, rtol=0, atol=1e-7)


def test_rows_of_an_incomplete_group_are_dropped_with_a_warning():
    batch, policies = sampled(rows=7), [tiny_model(), tiny_model()]
    trainer = GRPOTrainer(policies[0], config={"learning_rate": 0.01})
    with pytest.warns(UserWarning, match="3 of 7 rows are an incomplete group of 4") as caught:
        metrics = trainer.train_step(**batch)
    assert len(caught) == 1
    whole = GRPOTrainer(policies[1], config={"learning_rate": 0.01})
    assert metrics == whole.train_step(**{k: v[:4] for k, v in batch.items()})
    assert_same_parameters(policies[0], parameters_of(policies[1]))
    with pytest.warns(UserWarning, match="3 of 7"):
        assert len(trainer.compute_group_advantages(batch["rewards"])[0]) == 4
    with pytest.raises(ValueError, match="3 rows are fewer than one group of 4"):
        trainer.train_step(**{k: v[:3] for k, v in batch.items()})


def test_groups_as_a_dimension():
    batch, policies = sampled(), [tiny_model(), tiny_model()]
    old = torch.zeros(8, 8) - 3
    expected = GRPOTrainer(policies[0], config={"learning_rate": 0.01, "group_size": 2}).train_step(
        **batch, old_log_probs=old
    )
    grouped = {k: v.unflatten(0, (4, 2)) for k, v in {**batch, "old_log_probs": old}.items()}
    metrics = GRPOTrainer(policies[1], config={"learning_rate": 0.01}).train_step(**grouped)
    assert metrics == expected
    assert_same_parameters(policies[0], parameters_of(policies[1]))


def test_side_and_length_of_the_padding_do_not_matter():
    for name in MODELS:
        policy, batch = MODELS[name](), sampled()
        trainer = GRPOTrainer(policy, ref_policy_model=MODELS[name](1))
        advantages, _ = trainer.compute_group_advantages(batch["rewards"])
        ids, mask = batch["responses"], batch["response_masks"]
        loss, metrics = trainer.compute_policy_loss(ids, mask, advantages, prompt_lengths=PROMPT)
        right = F.pad(ids, (0, 3), value=-1), F.pad(mask, (0, 3))
        for padded in (shifted_left(ids, mask, 2), right):
            other, same = trainer.compute_policy_loss(*padded, advantages, prompt_lengths=PROMPT)
            assert other.item() == pytest.approx(loss.item(), abs=1e-9)
            assert same["kl_divergence"].item() == pytest.approx(metrics["kl_divergence"].item())
        tokens = mask.clone()
        tokens[:, :PROMPT] = 0
        other, _ = trainer.compute_policy_loss(ids, mask, advantages, response_token_mask=tokens)
        assert other.item() == loss.item()


def test_micro_batches_equal_one_large_batch():
    batch, results = sampled(rows=10), []
    for steps in (1, 3):
        policy = tiny_model()
        trainer = GRPOTrainer(
            policy,
            config={"learning_rate": 0.01, "group_size": 5, "use_critic": True},
            ref_policy_model=tiny_model(1),
            gradient_accumulation_steps=steps,
        )
        metrics = [trainer.train_step(**batch) for _ in range(3)][-1]
        results.append((metrics, parameters_of(policy), trainer))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-10)
    assert_same_parameters(results[1][2].policy_model, results[0][1], 1e-10)


def make_resumable(seed):
    return create_grpo_trainer(
        tiny_model(seed, dropout=0.2),
        lambda ids, masks: ids.double().mean(1),
        learning_rate=0.01,
        use_critic=True,
        target_kl=0.01,
        max_new_tokens=5,
        ref_policy_model="copy",
        scheduler=halving,
        eos_token_id=2,
    )


PROMPTS = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(5))


def test_a_resumed_run_is_bit_identical(tmp_path):
    trainer = make_resumable(0)
    for _ in range(3):
        trainer.train_step_from_prompts(PROMPTS)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    never_stopped = [trainer.train_step_from_prompts(PROMPTS) for _ in range(3)]
    torch.manual_seed(99)
    resumed = make_resumable(1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.train_step_from_prompts(PROMPTS) for _ in range(3)] == never_stopped
    assert_same_parameters(resumed.policy_model, parameters_of(trainer.policy_model))
    assert_same_parameters(resumed.value_head, parameters_of(trainer.value_head))
    assert_same_parameters(resumed.ref_policy_model, parameters_of(trainer.ref_policy_model))
    assert resumed._kl_coef.value == trainer._kl_coef.value != 0.1
    assert never_stopped[0]["kl_divergence"] > 0 and len(set(m["mean_reward"] for m in
                                                             never_stopped)) == 3  # fmt: skip


# KL, critic, rewards


def test_the_reference():
    batch = sampled()
    policy = tiny_llama()
    start = copy.deepcopy(policy)
    trainer = GRPOTrainer(policy, config={"learning_rate": 0.01}, ref_policy_model="copy")
    assert trainer.train_step(**batch)["kl_divergence"] == pytest.approx(0, abs=1e-9)
    expected = paper_loss(policy, start, batch)[1].item()
    full = {**batch, "prompt_lengths": PROMPT}
    assert trainer.train_step(**full)["kl_divergence"] == pytest.approx(expected, abs=1e-9) != 0
    assert_same_parameters(trainer.ref_policy_model, parameters_of(start))
    assert GRPOTrainer(policy).train_step(**batch)["kl_divergence"] == 0.0
    with pytest.raises(ValueError, match="policy itself"):
        GRPOTrainer(policy, ref_policy_model=policy)
    with pytest.raises(ValueError, match="target_kl needs a reference"):
        GRPOTrainer(policy, config={"target_kl": 0.1})
    with pytest.raises(ValueError, match="vocabulary"):
        GRPOTrainer(tiny_model(), ref_policy_model=tiny_model(vocabulary=70))


def test_a_disabled_adapter_is_the_reference():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    policy = get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    trainer = GRPOTrainer(policy, ref_policy_model="copy")
    assert trainer.ref_policy_model is None
    batch = sampled()
    expected = paper_loss(policy, tiny_llama(), batch)[1].item()
    metrics = trainer.train_step(**batch, prompt_lengths=PROMPT)
    assert metrics["kl_divergence"] == pytest.approx(expected, abs=1e-9) and expected > 1e-3


def test_target_kl_adapts_the_weight():
    """Ziegler 2019: 10 % of the relative error, of which at most 20 % count."""
    for target, factor in ((1e-9, 1.02), (1e9, 0.98)):
        trainer = GRPOTrainer(
            tiny_model(), config={"target_kl": target}, ref_policy_model=tiny_model(1)
        )
        loss = trainer.train_step(**sampled())
        assert trainer._kl_coef.value == pytest.approx(0.1 * factor)
        assert loss["kl_divergence"] > 0
    kl = loss["kl_divergence"]
    near = GRPOTrainer(tiny_model(), config={"target_kl": kl / 1.1}, ref_policy_model=tiny_model(1))
    near.train_step(**sampled())
    assert near._kl_coef.value == pytest.approx(0.1 * 1.01)


@pytest.mark.parametrize("name", MODELS)
def test_the_critic_learns_the_rewards(name):
    policy = MODELS[name]()
    own = torch.optim.SGD(policy.parameters(), lr=0.0)
    trainer = GRPOTrainer(policy, None, own, {"use_critic": True, "value_loss_coef": 1.0})
    head = trainer.value_head.linear
    assert any(head.weight is p for p in own.param_groups[0]["params"])
    assert head.in_features == 16
    batch = sampled()
    first = trainer.train_step(**batch)
    tokens = batch["response_masks"][:, 1:]  # the head says 0 at first: the loss is r^2 / 2
    expected = (0.5 * batch["rewards"].square().unsqueeze(1) * tokens).sum() / tokens.sum()
    assert first["value_loss"] == pytest.approx(expected.item(), abs=1e-9)
    assert first["total_loss"] == pytest.approx(
        first["policy_loss"] + first["value_loss"], abs=1e-9
    )
    own.param_groups[0]["lr"] = 0.05
    policy.requires_grad_(False)
    for _ in range(20):
        last = trainer.train_step(**batch)
    assert last["value_loss"] < 0.95 * first["value_loss"]


def test_rewards_of_every_form():
    policy, batch = tiny_model(), sampled()
    del batch["rewards"]
    expected = batch["responses"].float().mean(1)
    model = torch.nn.Linear(1, 1)
    model.forward = lambda ids, masks: {"rewards": ids.float().mean(1, keepdim=True)}
    for source in (
        lambda ids, masks: ids.float().mean(1),
        lambda ids, masks: ids.float().mean(1).tolist(),
        lambda ids, masks: {"rewards": ids.float().mean(1, keepdim=True)},
        model,
    ):
        trainer = GRPOTrainer(policy, source)
        assert trainer.reward_model is source
        full = torch.ones_like(batch["responses"])
        rewards = trainer.compute_rewards(batch["responses"], full)
        assert rewards.shape == (8,) and torch.equal(rewards, expected)
        assert trainer.train_step(batch["responses"])["mean_reward"] == pytest.approx(
            expected.mean().item(), rel=1e-6
        )


def test_rewards_of_texts():
    class Tokenizer:
        def batch_decode(self, rows, skip_special_tokens):
            assert skip_special_tokens
            return [" ".join(map(str, row)) for row in rows]

    seen = []

    def score(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(response.split())) for response in responses]

    trainer = GRPOTrainer(tiny_model(), TextReward(score, Tokenizer()))
    batch = sampled()
    ids, mask = batch["responses"], batch["response_masks"]
    metrics = trainer.train_step(ids, mask, prompt_lengths=PROMPT)
    prompts, responses = seen[0]
    assert prompts[0] == " ".join(map(str, ids[0, :PROMPT].tolist()))
    assert responses[0] == " ".join(map(str, ids[0, PROMPT : int(mask[0].sum())].tolist()))
    assert metrics["mean_reward"] == (mask.sum(-1) - PROMPT).float().mean().item()


# Rewards that are left out, cut responses, rows


@pytest.mark.parametrize("kind", ["relative", "normalized", "rank"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_without_reward_has_no_part_in_its_group(kind, steps):
    """As if the row had never been sampled; a group of one that is left says nothing."""
    batch = sampled(rows=12)
    left_out = [1, 4, 5, 6]
    rewards = [None if i in left_out else r for i, r in enumerate(batch["rewards"].tolist())]
    policy, plain = tiny_model(), tiny_model()
    options = {"advantage_type": kind, "aggregation": "token_mean", "learning_rate": 0.01}
    trainer = GRPOTrainer(
        policy, config=options, ref_policy_model=tiny_model(1), gradient_accumulation_steps=steps
    )
    old = torch.full((12, 8), -4.0, dtype=torch.float64)
    metrics = trainer.train_step(**{**batch, "rewards": rewards}, old_log_probs=old)
    kept = [i for i in range(12) if i not in left_out]
    groups = [[0, 2, 3], [7], [8, 9, 10, 11]]
    advantages = torch.cat([paper_advantages(batch["rewards"][g], len(g), kind) for g in groups])
    whole = GRPOTrainer(plain, config=options, ref_policy_model=tiny_model(1))
    ids, mask = batch["responses"][kept], batch["response_masks"][kept]
    loss, _ = whole.compute_policy_loss(ids, mask, advantages, old[kept])
    assert metrics["total_loss"] == pytest.approx(loss.item(), abs=1e-7)  # a list is float32
    whole.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    whole.optimizer.step()
    assert_same_parameters(policy, parameters_of(plain), 1e-6)
    assert metrics["mean_reward"] == pytest.approx(batch["rewards"][kept].mean().item())
    variances = [batch["rewards"][g].var().item() if len(g) > 1 else 0.0 for g in groups]
    assert metrics["group_variance"] == pytest.approx(sum(variances) / 3)
    assert trainer.curves.columns["abstained_share"].tolist() == [4 / 12]


def test_a_batch_without_any_reward():
    """An error as long as nothing was ever rewarded: else a warning, and nothing is learned."""
    answers = []
    policy = tiny_model()
    start = parameters_of(policy)
    trainer = GRPOTrainer(policy, lambda ids, masks: answers.pop(), config={"kl_coef": 1.0},
                          ref_policy_model=tiny_model(1))  # fmt: skip
    answers.append([None] * 8)
    message = "the reward model returned None for all 8 responses of a batch: expected a number"
    with pytest.raises(RuntimeError, match=message):
        trainer.train_step(BATCH["responses"])
    answers += [[None] * 8, [1.0] * 8]
    trainer.compute_rewards(BATCH["responses"])
    with pytest.warns(UserWarning, match="None for all 8 responses of a batch: nothing is learned"):
        metrics = trainer.train_step(BATCH["responses"])
    assert metrics["total_loss"] == metrics["mean_reward"] == metrics["kl_divergence"] == 0.0
    assert_same_parameters(policy, start)


def cut_batch():
    """Rows 0, 3 and 6 end with the end token 2, the others are cut."""
    batch = sampled()
    ids = batch["responses"].clone()
    ids[ids == 2] = 3
    ids[torch.arange(8), batch["response_masks"].sum(1) - 1] = 9
    for row in (0, 3, 6):
        ids[row, batch["response_masks"][row].sum() - 1] = 2
    return {**batch, "responses": ids}


def test_cut_responses():
    batch, results = cut_batch(), {}
    finished = torch.tensor([i in (0, 3, 6) for i in range(8)])
    config = {"learning_rate": 0.01, "aggregation": "token_mean"}
    for choice in ("keep", "mask", "penalty"):
        trainer = GRPOTrainer(tiny_model(), config={**config, "cut_responses": choice,
                              "cut_penalty": 0.7}, eos_token_id=2)  # fmt: skip
        old = torch.full((8, 8), -4.0, dtype=torch.float64)
        results[choice] = trainer.train_step(**batch, old_log_probs=old)
        assert trainer.curves.columns["cut_share"].tolist() == [5 / 8]
    plain = GRPOTrainer(tiny_model(), config=config)
    ids, masks, rewards = batch["responses"], batch["response_masks"], batch["rewards"]

    def loss(rewards, rows):
        advantages = paper_advantages(rewards, 4)[rows]
        return plain.compute_policy_loss(ids[rows], masks[rows], advantages, old[rows])[0].item()

    expected = {
        "keep": loss(rewards, finished | True),
        "mask": loss(rewards, finished),
        "penalty": loss(rewards - 0.7 * ~finished, finished | True),
    }
    for choice, value in expected.items():
        assert results[choice]["total_loss"] == pytest.approx(value, abs=1e-9), choice
        assert results[choice]["mean_reward"] == pytest.approx(rewards.mean().item())
    told = GRPOTrainer(tiny_model(), config={**config, "cut_responses": "mask"}, eos_token_id=50)
    step = {**batch, "old_log_probs": old, "finished": finished}
    assert told.train_step(**step)["total_loss"] == pytest.approx(expected["mask"], abs=1e-9)
    with pytest.raises(ValueError, match="cut_responses='mask' needs what ends a response"):
        GRPOTrainer(tiny_model(), config={"cut_responses": "mask"})


def test_all_responses_are_cut():
    policy = tiny_model()
    start = parameters_of(policy)
    trainer = GRPOTrainer(policy, config={"cut_responses": "mask", "aggregation": "dr_grpo"},
                          eos_token_id=60, ref_policy_model=tiny_model(1))  # fmt: skip
    ids = BATCH["responses"].clamp(max=59)
    metrics = trainer.train_step(ids, rewards=BATCH["rewards"])
    assert metrics["total_loss"] == 0.0 and trainer.curves.columns["cut_share"].tolist() == [1.0]
    assert_same_parameters(policy, start)


def test_the_reward_is_told_rows_and_ends():
    """The same prompt may stand in several rows: each response is known by its position."""
    seen = []

    def reward(ids, masks, response_token_mask, rows, finished):
        seen.append((rows.tolist(), finished))
        last = (response_token_mask * torch.arange(ids.shape[1])).argmax(1)
        ended = ids[torch.arange(len(ids)), last] == 2
        assert torch.equal(finished, ended)
        return {"rewards": rows.double(), "parts": {"a": rows.tolist(), "b": [None] * len(rows)}}

    config = {"group_size": 2, "max_new_tokens": 4}
    trainer = GRPOTrainer(tiny_llama(), reward, config=config)
    same = PROMPTS[:1].repeat(3, 1)
    metrics = trainer.train_step_from_prompts(same, rows=torch.tensor([7, 3, 5]))
    assert seen[0][0] == [7, 7, 3, 3, 5, 5] and metrics["mean_reward"] == 5.0
    assert metrics["reward_a"] == 5.0 and metrics["reward_b"] == 0.0
    assert metrics["cut_share"] == 1 - seen[0][1].double().mean().item()
    assert metrics["abstained_share"] == 0.0 and metrics["abstained_share_b"] == 1.0
    measured = trainer.eval_step(same, rows=[1, 2, 6])
    assert seen[1][0] == [1, 2, 6] and measured["mean_reward"] == measured["reward_a"] == 3.0
    assert 0 <= measured["cut_share"] <= 1
    with pytest.raises(ValueError, match=r"rows: expected \(6,\) integers, got \(4,\)"):
        trainer.train_step_from_prompts(same, rows=[1, 2])


def test_a_stop_string_ends_a_response():
    class Letters:
        eos_token_id = None

        def decode(self, ids, skip_special_tokens):
            return "".join(chr(0x430 + i) for i in ids)

    trainer = GRPOTrainer(
        tiny_model(), lambda ids, masks: ids[:, 0], tokenizer=Letters(),
        stop_strings=[chr(0x430 + i) for i in range(0, 61, 2)], max_new_tokens=12,
    )  # fmt: skip
    metrics = trainer.train_step_from_prompts(PROMPTS)
    assert metrics["response_length"] < 6 and metrics["cut_share"] < 0.5


def test_the_first_token_after_left_padding_does_not_count():
    """A first token has no log-probability, also where a response mask marks every real token."""
    batch = sampled()
    ids, mask = shifted_left(batch["responses"], batch["response_masks"], 2)
    policy = tiny_model()
    trainer = GRPOTrainer(policy, config={"aggregation": "token_mean"})
    advantages = torch.ones(8, dtype=torch.float64)
    old = torch.full((8, ids.shape[1] - 1), -3.0, dtype=torch.float64)
    loss, _ = trainer.compute_policy_loss(ids, mask, advantages, old, response_token_mask=mask)
    terms = []
    for row, real in zip(batch["responses"], batch["response_masks"], strict=True):
        ratio = torch.exp(paper_logps(policy, row[real.bool()], 1) + 3)
        terms.append(-torch.minimum(ratio, ratio.clamp(0.8, 1.2)))
    assert loss.item() == pytest.approx(torch.cat(terms).mean().item(), abs=1e-9)


# On-line steps


def test_a_step_from_prompts_samples_groups():
    calls = []

    def reward(ids, masks, response_token_mask):
        calls.append((ids, masks, response_token_mask))
        return (ids * response_token_mask).sum(1).float()

    trainer = GRPOTrainer(tiny_llama(), reward, config={"group_size": 3, "max_new_tokens": 4})
    masks = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    metrics = trainer.train_step_from_prompts(PROMPTS, masks)
    ((ids, real, tokens),) = calls
    assert ids.shape[0] == 6 and torch.equal(ids[:3, :4], PROMPTS[:1].expand(3, 4))
    assert torch.equal(ids[3:, 2:4], PROMPTS[1:, 2:].expand(3, 2)) and not real[3:, :2].any()
    assert not tokens[:, :4].any() and torch.equal(tokens[:, 4:], real[:, 4:])
    assert metrics["response_length"] == pytest.approx(tokens.sum().item() / 6)
    assert metrics["mean_reward"] == pytest.approx((ids * tokens).sum().item() / 6)
    trainer.train_step_from_prompts(PROMPTS, max_new_tokens=1)
    assert calls[1][0].shape == (6, 5)


def test_a_rollout_callable_replaces_sampling():
    asked = []

    def rollout(prompts, masks, max_new_tokens, temperature):
        asked.append((prompts.shape, max_new_tokens, temperature))
        answer = torch.full((len(prompts), 2), 7)
        ids = torch.cat([prompts, answer], 1)
        tokens = torch.cat([0 * masks, 1 + 0 * answer], 1)
        return ids, torch.cat([masks, 1 + 0 * answer], 1), tokens, torch.full((8, 5), -1.0)

    trainer = GRPOTrainer(
        tiny_model(), lambda ids, masks: ids[:, 0].float(), rollout=rollout,
        config={"sampling_temperature": 0.7, "max_length": 10},
    )  # fmt: skip
    trainer.train_step_from_prompts(PROMPTS)
    assert asked == [(torch.Size([8, 4]), 6, 0.7)]
    with pytest.raises(ValueError, match="must answer 8 prompts"):
        GRPOTrainer(
            tiny_model(), lambda ids, masks: [0.0], rollout=lambda *a: (PROMPTS, PROMPTS, PROMPTS)
        ).train_step_from_prompts(PROMPTS)


# Refusals


def nan_rewards(ids, masks):
    return [0.0] * 7 + [float("nan")]


def failing(ids, masks):
    raise KeyError("no such word")


BATCH = sampled()
EMPTY = BATCH["response_masks"].clone()
EMPTY[5, PROMPT:] = 0
REFUSED = {
    "response_masks must be": {**BATCH, "response_masks": torch.ones(8, 3)},
    "row 5 of responses has an empty response": {
        **BATCH, "response_masks": EMPTY, "prompt_lengths": PROMPT,
    },
    r"got nan in row 2": {**BATCH, "rewards": BATCH["rewards"].index_fill(
        0, torch.tensor([2]), torch.nan)},
    r"rewards must be one a row, 8, got \(3,\)": {**BATCH, "rewards": torch.zeros(3)},
    r"old_log_probs must be a tensor \(8, 8\)": {**BATCH, "old_log_probs": torch.zeros(8, 9)},
    rf"responses must be in \[0, {VOCABULARY}\)": {**BATCH, "responses": BATCH["responses"] + 60},
    "neither rewards nor a reward model": {**BATCH, "rewards": None},
    r"responses must be a tensor \(B, S\)": {**BATCH, "responses": BATCH["responses"][0]},
    "not both": {**BATCH, "prompt_lengths": 2, "response_token_mask": BATCH["response_masks"]},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_batch_that_does_not_fit_is_refused(message):
    policy = tiny_model()
    trainer = GRPOTrainer(policy)
    start = parameters_of(policy)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**REFUSED[message])
    assert_same_parameters(policy, start)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (nan_rewards, ValueError, "finite, got nan in row 7"),
        (failing, RuntimeError, "failed on 8 sequences: KeyError"),
        (lambda ids, masks: [1.0], ValueError, "one a row, 8"),
        (lambda ids, masks: None, ValueError, "a tensor, 8 numbers or .*, got NoneType"),
        (lambda ids, masks: {"reward": [1.0]}, ValueError, r"got dict with \['reward'\]"),
        (lambda ids, masks: (1.0 for _ in ids), ValueError, "got generator"),
        (lambda ids, masks: ["good"] * 8, ValueError, "8 numbers or .*, got list"),
        (lambda ids, masks: [[1.0], [1.0, 2.0]] * 4, ValueError, "8 numbers or .*, got list"),
        (lambda ids, masks: torch.ones(8) * 1j, ValueError, "8 numbers or .*, got Tensor"),
    ],
)
def test_rewards_that_cannot_be_used(reward, error, message):
    policy = tiny_model()
    trainer = GRPOTrainer(policy, reward)
    start = parameters_of(policy)
    with pytest.raises(error, match=message):
        trainer.train_step(BATCH["responses"])
    assert_same_parameters(policy, start)


def test_prompts_that_do_not_fit():
    trainer = GRPOTrainer(tiny_model(), nan_rewards, config={"max_length": 4})
    with pytest.raises(ValueError, match="a prompt has 4 tokens, no room"):
        trainer.train_step_from_prompts(PROMPTS)
    with pytest.raises(ValueError, match="row 1 of prompt_masks"):
        trainer.train_step_from_prompts(PROMPTS, torch.tensor([[1] * 4, [0] * 4]))
    with pytest.raises(ValueError, match="prompts must be in"):
        trainer.train_step_from_prompts(PROMPTS[:, :3] + VOCABULARY)


CONFIG_ERRORS = [
    ({"group_size": 0}, "group_size"), ({"group_size": 2.0}, "group_size"),
    ({"advantage_type": "mean"}, "advantage_type"), ({"temperature": -1.0}, "temperature"),
    ({"clip_range": -0.1}, "clip_range"), ({"clip_range": 1.0}, "clip_range"),
    ({"kl_coef": -0.1}, "kl_coef"), ({"target_kl": 0}, "target_kl"),
    ({"target_kl": 0.1, "kl_coef": 0.0}, "target_kl"), ({"use_critic": 1}, "use_critic"),
    ({"value_loss_coef": -1}, "value_loss_coef"), ({"learning_rate": -1}, "learning_rate"),
    ({"loss_type": "ppo"}, "loss_type"), ({"aggregation": "mean"}, "aggregation"),
    ({"ratio_level": "word"}, "ratio_level"), ({"dual_clip": 0.5}, "dual_clip"),
    ({"sampling_temperature": 0}, "sampling_temperature"), ({"max_new_tokens": 0}, "max_new"),
    ({"cut_responses": "drop"}, "cut_responses"), ({"cut_penalty": -1}, "cut_penalty"),
    ({"kl_estimator": "k9"}, "kl_estimator"), ({"grup_size": 4}, r"'grup_size'.*group_size"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), CONFIG_ERRORS)
def test_impossible_options_are_refused_at_construction(options, message):
    for make in (
        lambda policy: GRPOTrainer(policy, config=options),
        lambda policy: GRPOTrainer(policy, **options),
        lambda policy: create_grpo_trainer(policy, **options),
    ):
        with pytest.raises(ValueError, match=message):
            make(tiny_model())


def test_what_the_configuration_says_is_no_option():
    with pytest.raises(ValueError, match=r"GRPOTrainer has no option 'value_head'.*use_critic"):
        create_grpo_trainer(tiny_model(), value_head=True)


def test_defaults_and_attributes():
    policy = tiny_model()
    trainer = create_grpo_trainer(policy, None, {"group_size": 8}, clip_range=0.1)
    assert trainer.config == GRPOConfig(group_size=8, clip_range=0.1)
    assert trainer.policy_model is policy and trainer.ref_policy_model is None
    d = GRPOConfig()
    assert (d.group_size, d.advantage_type, d.temperature, d.learning_rate) == (
        4, "relative", 1.0, 1e-5,
    )  # fmt: skip
    assert (d.max_grad_norm, d.clip_range, d.kl_coef, d.target_kl) == (1.0, 0.2, 0.1, None)
    assert (d.value_loss_coef, d.use_critic) == (0.5, False)


def test_a_policy_learns_what_is_rewarded():
    """Tokens below 20 are rewarded: the share of them among what is sampled rises."""
    policy = tiny_llama().float()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.div_(10)

    def reward(ids, masks, response_token_mask):
        return ((ids < 20) * response_token_mask).sum(1) / response_token_mask.sum(1)

    trainer = create_grpo_trainer(
        policy, reward, learning_rate=1e-2, group_size=8, max_new_tokens=4, eos_token_id=[],
        ref_policy_model="copy", kl_coef=0.01,
    )  # fmt: skip
    rewards = [trainer.train_step_from_prompts(PROMPTS)["mean_reward"] for _ in range(40)]
    assert sum(rewards[:3]) / 3 < 0.55 and sum(rewards[-5:]) / 5 > 0.85
