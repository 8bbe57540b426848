"""The RLHF trainer against PPO written out here from the papers, and what its contract promises."""

import copy

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import gae, policy_loss, value_loss
from apt_model.rl import RewardModel, RLHFConfig, RLHFTrainer, create_rlhf_trainer
from apt_model.scoring.output_head import Scoring
from support.tiny_models import VOCABULARY, TinyCausalModel, parameters_of, tiny_llama
from support.trainer_checks import assert_same_parameters, halving
from trainers.test_grpo_trainer import MODELS, tiny_model

RETURNED = ["mean_reward", "mean_kl", "ppo_loss", "policy_loss", "value_loss", "entropy"]
MORE = ["clip_fraction", "explained_variance", "response_length", "learning_rate"]
PROMPTS = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(5))
MASKS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
PROMPT_WIDTH, WIDTH = 5, 11


def reward(ids, masks):
    return (ids * masks).double().sum(1) / 100


def fixed_rollout(prompts, masks, max_new_tokens, temperature):
    """Always the same responses, of several lengths."""
    generator = torch.Generator().manual_seed(7)
    width = WIDTH - prompts.shape[1]
    new = torch.randint(3, VOCABULARY, (len(prompts), width), generator=generator)
    lengths = torch.tensor([[3], [6], [1], [5]])[: len(prompts)]
    real = (torch.arange(width) < lengths).long()
    mask = torch.cat([masks, real], 1)
    return torch.cat([prompts, new], 1), mask, torch.cat([0 * masks, real], 1)


def trainer_of(policy, reference=None, reward_model=reward, **options):
    config = {k: options.pop(k) for k in list(options) if k in RLHFConfig.__dataclass_fields__}
    return RLHFTrainer(policy, reward_model, reference, config=config, **options)


# One step from the papers


def last_hidden(model, ids):
    """Logits and what goes into the output layer, of one sequence without padding."""
    found = []
    head = model.lm_head
    hook = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    output = model(ids)
    hook.remove()
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits[0], found[0][0]


def paper_scores(model, head, row, start, temperature=1.0):
    """log pi, entropy and value of each response token of one sequence."""
    logits, hidden = last_hidden(model, row[None])
    log_probs = F.log_softmax(logits / temperature, -1)
    at = range(start - 1, len(row) - 1)
    logps = torch.stack([log_probs[t, row[t + 1]] for t in at])
    entropy = torch.stack([-(log_probs[t].exp() * log_probs[t]).sum() for t in at])
    values = None if head is None else torch.stack([head(hidden[t])[0] for t in at])
    return logps, entropy, values


def paper_gae(rewards, values, gamma, lam):
    """Schulman 2016, equation 16."""
    advantages, following, trace = [], 0.0, 0.0
    for r, v in zip(rewards.flip(0), values.flip(0), strict=True):
        trace = r + gamma * following - v + gamma * lam * trace
        following = v
        advantages.append(trace)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values


def paper_step(policy, reference, head, optimizer, epochs=2, minibatches=None, temperature=1.0,
               scale=1.0, value_clip=0.2):  # fmt: skip
    """PPO as Ouyang 2022 and Schulman 2017 have it, over the fixed responses, row by row."""
    order = MASKS.argsort(dim=1, stable=True)
    prompts, masks = PROMPTS.gather(1, order), MASKS.gather(1, order)
    ids, real, tokens = fixed_rollout(prompts, masks, 6, 1.0)
    rows = [row[m.bool()] for row, m in zip(ids, real, strict=True)]
    starts = [int(m.sum()) - int(t.sum()) for m, t in zip(real, tokens, strict=True)]
    scores = reward(ids * real, real)
    old, advantages, returns, kls = [], [], [], []
    with torch.no_grad():
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            logps, _, values = paper_scores(policy, head, row, start, temperature)
            kl = logps - paper_scores(reference, None, row, start, temperature)[0]
            rewards = -0.1 * kl
            rewards[-1] += scale * scores[i]
            a, r = paper_gae(rewards, values, 0.99, 0.95)
            old.append((logps, values))
            advantages.append(a)
            returns.append(r)
            kls.append(kl)
        every = torch.cat(advantages)
        scale = torch.rsqrt(every.var() + 1e-8)
        advantages = [(a - every.mean()) * scale for a in advantages]
    metrics = {"mean_reward": scores.mean(), "mean_kl": torch.cat(kls).mean()}
    totals = []
    for _ in range(epochs):
        for chosen in minibatches or [range(4)]:
            count = sum(len(old[i][0]) for i in chosen)
            policy_loss = value_loss = entropies = 0.0
            for i in chosen:
                logps, entropy, values = paper_scores(policy, head, rows[i], starts[i], temperature)
                ratio = torch.exp(logps - old[i][0])
                a = advantages[i]
                policy_loss += -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
                clipped = old[i][1] + (values - old[i][1]).clamp(-value_clip, value_clip)
                value_loss += (
                    0.5
                    * torch.maximum((values - returns[i]) ** 2, (clipped - returns[i]) ** 2).sum()
                )
                entropies += entropy.sum()
            loss = (policy_loss + 0.1 * value_loss - 0.01 * entropies) / count
            optimizer.zero_grad()
            loss.backward()
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            sums = (policy_loss, value_loss, entropies)
            totals.append([loss.item(), *(x.item() / count for x in sums)])
    means = torch.tensor(totals, dtype=torch.float64).mean(0).tolist()
    metrics.update(zip(RETURNED[2:], means, strict=True))
    return {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    "options", [{"value_clip": 1e-3}, {"temperature": 0.7, "reward_scale": 0.5}]
)
@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_papers_in_plain_pytorch(name, options):
    policy, reference = MODELS[name](), MODELS[name](1)
    plain = copy.deepcopy(policy)
    head = torch.nn.Linear(16, 1).double()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    ours = torch.optim.SGD(policy.parameters(), lr=0.05)
    theirs = torch.optim.SGD([*plain.parameters(), *head.parameters()], lr=0.05)
    trainer = trainer_of(
        policy, reference, optimizer=ours, rollout=fixed_rollout, ppo_epochs=2, **options
    )
    for _ in range(2):
        expected = paper_step(
            plain, reference, head, theirs,
            temperature=options.get("temperature", 1.0),
            scale=options.get("reward_scale", 1.0),
            value_clip=options.get("value_clip", 0.2),
        )  # fmt: skip
        metrics = trainer.train_step(PROMPTS, MASKS)
        assert set(RETURNED + MORE) <= set(metrics)
        assert all(type(value) is float for value in metrics.values())
        for key in RETURNED:
            assert metrics[key] == pytest.approx(expected[key], abs=1e-9), key
    assert_same_parameters(policy, dict(plain.named_parameters()), 1e-9)
    assert_same_parameters(trainer.value_head.linear, dict(head.named_parameters()), 1e-9)
    assert trainer._policy.uses_hidden_states == (name != "bare logits")
    assert trainer.get_statistics() == {
        "total_steps": 2, "mean_reward": metrics["mean_reward"], "mean_kl": metrics["mean_kl"],
    }  # fmt: skip
    assert metrics["response_length"] == 15 / 4 and metrics["learning_rate"] == 0.05


def test_minibatches_are_steps_of_their_own(monkeypatch):
    policy, reference = tiny_model(), tiny_model(1)
    plain, head = copy.deepcopy(policy), torch.nn.Linear(16, 1).double()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    theirs = torch.optim.SGD([*plain.parameters(), *head.parameters()], lr=0.05)
    trainer = trainer_of(
        policy, reference, optimizer=torch.optim.SGD(policy.parameters(), lr=0.05),
        rollout=fixed_rollout, ppo_epochs=2, batch_size=3,
    )  # fmt: skip
    monkeypatch.setattr(torch, "randperm", lambda rows: torch.tensor([2, 0, 3, 1]))
    expected = paper_step(plain, reference, head, theirs, minibatches=[[2, 0], [3, 1]])
    metrics = trainer.train_step(PROMPTS, MASKS)
    for key in RETURNED:
        assert metrics[key] == pytest.approx(expected[key], abs=1e-9), key
    assert_same_parameters(policy, dict(plain.named_parameters()), 1e-9)
    assert trainer.total_steps == 1 and len(trainer.curves.columns["mean_kl"]) == 1


def test_minibatches_are_shuffled_and_hold_every_row_once():
    trainer = trainer_of(tiny_model(), rollout=fixed_rollout, batch_size=2, ppo_epochs=8)
    seen, update = [], trainer._update
    trainer._update = lambda batch, temperature: (
        seen.append(batch.input_ids[:, 5].tolist()) or update(batch, temperature)
    )
    trainer.train_step(PROMPTS, MASKS)
    epochs = [seen[i] + seen[i + 1] for i in range(0, 16, 2)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3 and all(len(rows) == 2 for rows in seen)


def test_micro_batches_equal_one_minibatch():
    results = []
    for steps in (1, 3):
        policy = tiny_llama()
        trainer = trainer_of(
            policy, tiny_llama(1), rollout=fixed_rollout, learning_rate=0.01,
            gradient_accumulation_steps=steps,
        )  # fmt: skip
        metrics = [trainer.train_step(PROMPTS, MASKS) for _ in range(2)][-1]
        results.append((metrics, parameters_of(policy), policy))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-9)
    assert_same_parameters(results[1][2], results[0][1], 1e-9)


# The parts of a step


def test_the_parts_make_the_step():
    """What a script does by hand with the public methods is what train_step does."""
    whole, parts = (
        trainer_of(tiny_model(), tiny_model(1), rollout=fixed_rollout, learning_rate=0.01)
        for _ in range(2)
    )
    torch.manual_seed(0)
    expected = whole.train_step(PROMPTS, MASKS)
    torch.manual_seed(0)
    ids, masks, logps, tokens = parts.generate_responses(PROMPTS, MASKS, 6, return_token_mask=True)
    assert torch.equal(parts.generate_responses(PROMPTS, MASKS, 6)[2], logps)
    of_policy = parts.get_log_probs(parts.policy_model, ids, masks)
    torch.testing.assert_close(logps, (of_policy * tokens[:, 1:]).detach(), rtol=0, atol=1e-12)
    ref = parts.get_log_probs(parts.ref_policy_model, ids, masks).detach()
    kl = parts.compute_kl_penalty(ids, masks, logps, response_token_mask=tokens)
    assert kl.shape == ids.shape and not kl[:, 0].any()
    assert torch.equal(parts.compute_kl_penalty(ids, masks, F.pad(logps, (1, 0), value=7),
                                                response_token_mask=tokens), kl)  # fmt: skip
    kl = kl[:, 1:]
    torch.testing.assert_close(kl, (logps - ref) * tokens[:, 1:], rtol=0, atol=1e-12)
    every = parts.compute_kl_penalty(ids, masks, of_policy.detach())[:, 1:]
    torch.testing.assert_close(every, (of_policy - ref).detach() * masks[:, 1:] * masks[:, :-1],
                               rtol=0, atol=1e-12)  # fmt: skip
    rewards = parts.compute_rewards(ids, masks)
    assert rewards.mean().item() == expected["mean_reward"]
    placed = torch.zeros_like(kl)
    for row, of_row in enumerate(tokens[:, 1:]):
        placed[row, of_row.nonzero()[-1]] = rewards[row]
    values = torch.zeros_like(kl)  # the head says 0 at first
    advantages, returns = parts.compute_advantages(placed - 0.1 * kl, values, tokens[:, 1:])
    same, _ = parts.compute_advantages(rewards, values, tokens[:, 1:])
    assert torch.equal(same, parts.compute_advantages(placed, values, tokens[:, 1:])[0])
    assert advantages[tokens[:, 1:] == 0].abs().sum() == 0
    counted = advantages[tokens[:, 1:] == 1]
    assert counted.mean().item() == pytest.approx(0) and counted.var().item() == pytest.approx(1)
    ids, masks, logps = parts.generate_responses(PROMPTS, MASKS, 6)
    metrics = parts.ppo_step(ids, masks, logps, advantages, returns)
    for key in RETURNED[2:] + ["clip_fraction", "approx_kl", "explained_variance"]:
        assert metrics[key] == pytest.approx(expected[key], abs=1e-9), key
    assert_same_parameters(parts.policy_model, parameters_of(whole.policy_model), 1e-9)
    assert parts.total_steps == 1


def test_ratios_are_of_the_temperature_that_was_sampled_at():
    trainer = trainer_of(tiny_model(), tiny_model(1), rollout=fixed_rollout, ppo_epochs=1,
                         batch_size=4)  # fmt: skip
    ids, masks, logps = trainer.generate_responses(PROMPTS, MASKS, 6, temperature=0.5)
    zero = torch.zeros_like(logps)
    metrics = trainer.ppo_step(ids, masks, logps, zero, zero)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-12)
    metrics = trainer.ppo_step(ids.clone(), masks, logps, zero, zero)  # not known to be those
    assert metrics["approx_kl"] > 1e-3


def test_log_probabilities_of_a_rollout_are_the_old_ones():
    noise = 0.4 * torch.sin(torch.arange(4.0 * (WIDTH - 1))).view(4, -1).double()

    def rollout(prompts, masks, max_new_tokens, temperature):
        ids, masks, tokens = fixed_rollout(prompts, masks, max_new_tokens, temperature)
        with torch.no_grad():
            logps = trainer.get_log_probs(policy, ids, masks)
        return ids, masks, tokens, logps + noise

    policy = tiny_model()
    trainer = trainer_of(policy, rollout=rollout, ppo_epochs=1, batch_size=4)
    metrics = trainer.train_step(PROMPTS, MASKS)
    _, _, tokens = fixed_rollout(PROMPTS, MASKS, 0, 1.0)
    d = noise[tokens[:, 1:] == 1]  # old minus new
    assert metrics["mean_kl"] == pytest.approx(0, abs=1e-12)  # to the reference: of the policy
    assert metrics["approx_kl"] == pytest.approx((torch.exp(-d) - 1 + d).mean().item(), abs=1e-9)
    noise[2, 4] = torch.nan
    with pytest.raises(ValueError, match="the rollout's logps must be finite, got nan in row 2"):
        trainer.train_step(PROMPTS, MASKS)


def test_the_losses_are_the_kernels():
    policy, reference = tiny_llama(), tiny_llama(1)
    trainer = trainer_of(
        policy, reference, rollout=fixed_rollout, ppo_epochs=1, batch_size=8, learning_rate=0.0
    )
    torch.nn.init.normal_(trainer.value_head.linear.weight)
    ids, masks, old, tokens = trainer.generate_responses(PROMPTS, MASKS, 6, return_token_mask=True)
    counted = tokens[:, 1:].bool()
    old = old + 0.3 * torch.sin(torch.arange(old.numel())).view_as(old) * counted
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(old.shape, generator=generator, dtype=old.dtype)
    rewards = torch.randn(old.shape, generator=generator, dtype=old.dtype)
    advantages, returns = trainer.compute_advantages(rewards, values, tokens[:, 1:])
    expected = gae(rewards, values, gamma=0.99, gae_lambda=0.95, mask=counted, whiten=True)
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1])
    how = Scoring(1.0, True, trainer.value_head)
    scored = trainer._policy.score(ids, masks, tokens.bool(), how=how)
    of_policy, measured = policy_loss(
        scored.logps, old, advantages, counted, entropy=scored.entropy, entropy_coef=0.01
    )
    of_values, _ = value_loss(scored.values, returns, counted, old_values=values, clip_range=0.2)
    metrics = trainer.ppo_step(
        ids, masks, old, advantages, returns, old_values=values, response_token_mask=tokens
    )
    assert metrics["ppo_loss"] == pytest.approx((of_policy + 0.1 * of_values).item(), abs=1e-9)
    assert metrics["value_loss"] == pytest.approx(of_values.item(), abs=1e-9)
    for key in ("policy_loss", "entropy", "clip_fraction", "approx_kl"):
        assert metrics[key] == pytest.approx(measured[key].item(), abs=1e-9), key
    explained = value_loss(values, returns, counted)[1]["explained_variance"].item()
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-9)


@pytest.mark.parametrize("case", ["mask", "penalty", "abstain", "nothing"])
def test_cut_responses_and_rows_that_abstain(case):
    """Rows 0 and 2 are finished. What is left out is as if it had never been sampled."""
    finished = torch.tensor([True, False, True, False])
    left_out = {"mask": ~finished, "abstain": ~finished, "nothing": finished | True}.get(case)

    def told(prompts, masks, *rest):
        ids, masks, tokens = fixed_rollout(prompts, masks, *rest)
        known = {"responses": ids, "response_masks": masks, "token_mask": tokens}
        return {**known, "finished": finished}

    def exact(ids, masks):  # in float32, as which a list of numbers is read
        return (ids * masks).double().sum(1) / 128

    def only_some(ids, masks):
        rewards = exact(ids, masks).tolist()
        if case != "abstain":
            return rewards
        return [r if end else None for r, end in zip(rewards, finished)]

    options = {"ppo_epochs": 1, "batch_size": 4, "learning_rate": 0.01, "eos_token_id": 2}
    choice = {"mask": "mask", "nothing": "mask", "penalty": "penalty"}.get(case, "keep")
    if case == "nothing":
        finished[:] = False
    policy = tiny_model()
    start = parameters_of(policy)
    trainer = trainer_of(policy, tiny_model(1), only_some, rollout=told, cut_responses=choice,
                         cut_penalty=0.25, **options)  # fmt: skip
    metrics = trainer.train_step(PROMPTS, MASKS)
    assert metrics["cut_share"] == 1 - finished.double().mean().item()
    assert metrics["abstained_share"] == (0.5 if case == "abstain" else 0.0)
    if case == "nothing":
        assert metrics["ppo_loss"] == metrics["value_loss"] == 0.0
        return assert_same_parameters(policy, start)
    assert metrics["response_length"] == 15 / 4

    def of_some(prompts, masks, *rest):
        order = MASKS.argsort(dim=1, stable=True)
        whole = fixed_rollout(PROMPTS.gather(1, order), MASKS.gather(1, order), *rest)
        return tuple(part[finished] for part in whole)

    def penalized(ids, masks):
        return exact(ids, masks) - 0.25 * ~finished

    plain = tiny_model()
    if left_out is None:
        other = trainer_of(plain, tiny_model(1), penalized, rollout=fixed_rollout, **options)
        expected = other.train_step(PROMPTS, MASKS)
        assert metrics["mean_reward"] == pytest.approx(expected["mean_reward"] + 0.125)
    else:
        other = trainer_of(plain, tiny_model(1), exact, rollout=of_some, **options)
        expected = other.train_step(PROMPTS[finished], MASKS[finished])
    for key in RETURNED[2:] + ["explained_variance"]:
        assert metrics[key] == pytest.approx(expected[key], abs=1e-9), key
    assert_same_parameters(policy, parameters_of(plain), 1e-9)


def test_rows_are_told():
    seen = []

    def of_rows(ids, masks, rows):
        seen.append(rows.tolist())
        return rows.double()

    trainer = trainer_of(tiny_model(), reward_model=of_rows, rollout=fixed_rollout)
    metrics = trainer.train_step(PROMPTS, MASKS, rows=torch.tensor([4, 0, 9, 1]))
    assert seen == [[4, 0, 9, 1]] and metrics["mean_reward"] == 3.5


def test_sampling_and_masks():
    policy = tiny_llama()
    trainer = trainer_of(policy)
    result = trainer.generate_responses(PROMPTS, MASKS, 7, 0.9, return_token_mask=True)
    ids, masks, logps, tokens = result
    assert ids.shape == masks.shape == tokens.shape and logps.shape == (4, ids.shape[1] - 1)
    assert torch.equal(masks[:, 5:], tokens[:, 5:]) and not tokens[:, :5].any()
    assert (logps[:, 4:][tokens[:, 5:] == 1] < 0).all() and not logps[:, :4].any()
    assert len(trainer.generate_responses(PROMPTS, MASKS, 7)) == 3
    row = ids[1][masks[1].bool()]
    log_probs = F.log_softmax(policy(row[None]).logits[0] / 0.9, -1)
    expected = log_probs[range(4, len(row) - 1), row[5:]]
    torch.testing.assert_close(logps[1, 4 : len(row) - 1], expected, rtol=0, atol=1e-9)


def test_the_copy_is_the_reference_and_the_first_kl_is_zero():
    policy = tiny_llama()
    start = parameters_of(policy)
    trainer = trainer_of(policy, learning_rate=0.02, max_new_tokens=6)
    first = trainer.train_step(PROMPTS, MASKS)
    assert first["mean_kl"] == pytest.approx(0, abs=1e-12)
    assert abs(trainer.train_step(PROMPTS, MASKS)["mean_kl"]) > 1e-6
    assert_same_parameters(trainer.ref_policy_model, start)


def test_target_kl_adapts_the_weight():
    for target, factor in ((1e9, 0.98), (1e-9, 1.02)):
        trainer = trainer_of(
            tiny_model(), tiny_model(1), target_kl=target, kl_estimator="k3", max_new_tokens=4
        )
        assert trainer.train_step(PROMPTS, MASKS)["kl_coef"] == 0.1
        assert trainer._kl_coef.value == pytest.approx(0.1 * factor)


def make_resumable(seed):
    return create_rlhf_trainer(
        tiny_model(seed, dropout=0.2), reward, learning_rate=0.01, target_kl=0.1, batch_size=2,
        max_new_tokens=5, scheduler=halving, eos_token_id=2, ppo_epochs=2,
    )  # fmt: skip


def test_a_resumed_run_is_bit_identical(tmp_path):
    trainer = make_resumable(0)
    for _ in range(2):
        trainer.train_step(PROMPTS, MASKS)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    never_stopped = [trainer.train_step(PROMPTS, MASKS) for _ in range(3)]
    torch.manual_seed(99)
    resumed = make_resumable(1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.train_step(PROMPTS, MASKS) for _ in range(3)] == never_stopped
    for part in ("policy_model", "value_head", "ref_policy_model"):
        assert_same_parameters(getattr(resumed, part), parameters_of(getattr(trainer, part)))
    assert resumed.get_statistics() == trainer.get_statistics()
    rates = trainer.curves.columns["learning_rate"].tolist()
    assert rates == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025])


def test_a_reward_model_is_asked_as_it_is():
    torch.manual_seed(0)
    base = torch.nn.Embedding(VOCABULARY, 8)
    base.forward = lambda input_ids, attention_mask=None: F.embedding(input_ids, base.weight)
    model = RewardModel(base, 8, num_layers=2, dropout=0.9)
    trainer = trainer_of(tiny_model(), reward_model=model, rollout=fixed_rollout)
    assert trainer.reward_model is model and model.training
    rewards = [trainer.train_step(PROMPTS, MASKS)["mean_reward"] for _ in range(2)]
    assert rewards[0] == rewards[1] and model.training  # without dropout
    assert all(p.grad is None for p in model.parameters())


class NoHead(TinyCausalModel):
    """Ties its output to the embedding without a layer."""

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.mix(self.embedding(input_ids).repeat(1, 1, 2)))
        return F.linear(x, self.embedding.weight)


def test_a_value_head_on_any_model():
    for policy, width in ((NoHead().double(), VOCABULARY), (tiny_llama(), 16)):
        trainer = trainer_of(policy, rollout=fixed_rollout, learning_rate=0.01)
        assert trainer.value_head.linear.in_features == width
        first = trainer.train_step(PROMPTS, MASKS)["value_loss"]
        for _ in range(10):
            last = trainer.train_step(PROMPTS, MASKS)["value_loss"]
        assert last < first
    half = trainer_of(tiny_model().bfloat16(), rollout=fixed_rollout)
    assert half.value_head.linear.weight.dtype is torch.float32
    assert half.train_step(PROMPTS, MASKS)["value_loss"] > 0


@pytest.mark.parametrize("name", ["llama", "bare logits"])
def test_autocast(name):
    policy = MODELS[name]().float()
    plain = trainer_of(copy.deepcopy(policy), rollout=fixed_rollout).train_step(PROMPTS, MASKS)
    trainer = trainer_of(policy, rollout=fixed_rollout, autocast_dtype="bf16")
    metrics = trainer.train_step(PROMPTS, MASKS)
    assert metrics["entropy"] == pytest.approx(plain["entropy"], rel=0.05)
    assert metrics["entropy"] != plain["entropy"]


def test_evaluation():
    policy, reference = tiny_llama(), tiny_llama(1)
    trainer = trainer_of(policy, reference, eos_token_id=[], max_new_tokens=4)
    state = torch.get_rng_state()
    metrics = trainer.eval_step(PROMPTS[1:2])
    assert torch.equal(torch.get_rng_state(), state) and trainer.total_steps == 0
    ids, masks, logps = trainer.generate_responses(PROMPTS[1:2], None, 4, 1e-6)
    assert metrics["mean_reward"] == reward(ids, masks).item()
    logps, ref = (
        paper_scores(model, None, ids[0], 5)[0].sum().item() for model in (policy, reference)
    )
    assert metrics["sequence_kl"] == pytest.approx(logps - ref, abs=1e-9)
    assert metrics["response_length"] == 4 and policy.training


# Refusals


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda ids, masks: [float("nan")] * 4, ValueError, "finite, got nan in row 0"),
        (lambda ids, masks: [0.0] * 3, ValueError, "one a row, 4"),
        (lambda ids, masks: 1 / 0, RuntimeError, "failed on 4 sequences: ZeroDivisionError"),
    ],
)
def test_rewards_that_cannot_be_used(source, error, message):
    policy = tiny_model()
    start = parameters_of(policy)
    trainer = trainer_of(policy, reward_model=source, max_new_tokens=3)
    with pytest.raises(error, match=message):
        trainer.train_step(PROMPTS, MASKS)
    assert_same_parameters(policy, start)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


def test_batches_that_do_not_fit():
    policy = tiny_model()
    trainer, start = trainer_of(policy, max_length=5), parameters_of(policy)
    with pytest.raises(ValueError, match="a prompt has 5 tokens, no room"):
        trainer.train_step(PROMPTS, MASKS)
    with pytest.raises(ValueError, match="prompt_masks must be"):
        trainer.train_step(PROMPTS, MASKS[:, :2])
    with pytest.raises(ValueError, match="prompts must be in"):
        trainer.train_step(PROMPTS[:, :3] + VOCABULARY)
    ids, some = PROMPTS, torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"advantages must be a tensor \(4, 4\)"):
        trainer.ppo_step(ids, None, some, some[:, :2], some)
    with pytest.raises(ValueError, match="row 2 of responses has an empty response"):
        trainer.ppo_step(ids, None, some, some, some, prompt_lengths=[1, 2, 5, 3])
    wrong = some.clone()
    wrong[3, 2] = torch.nan
    for name in ("old_log_probs", "advantages", "returns", "old_values"):
        numbers = dict.fromkeys(("old_log_probs", "advantages", "returns", "old_values"), some)
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan in row 3, place 2"):
            trainer.ppo_step(ids, None, **{**numbers, name: wrong})
    assert_same_parameters(policy, start)
    empty = trainer_of(tiny_model(), rollout=lambda p, m, *_: (p, m, 0 * m))
    with pytest.raises(ValueError, match="empty response"):
        empty.train_step(PROMPTS, MASKS)
    with pytest.raises(ValueError, match="policy itself"):
        trainer_of(policy, policy)
    with pytest.raises(ValueError, match="vocabulary"):
        trainer_of(policy, tiny_model(vocabulary=70))
    with pytest.raises(TypeError, match="reward_model must be callable"):
        RLHFTrainer(policy, 3.0)


CONFIG_ERRORS = [
    ({"ppo_epochs": 0}, "ppo_epochs"), ({"clip_epsilon": 0}, "clip_epsilon"),
    ({"clip_epsilon": 1.0}, "clip_epsilon"), ({"value_loss_coef": -1}, "value_loss_coef"),
    ({"kl_coef": -1}, "kl_coef"), ({"reward_scale": 0}, "reward_scale"),
    ({"batch_size": 1.5}, "batch_size"), ({"max_length": 0}, "max_length"),
    ({"gamma": 1.1}, "gamma"), ({"gae_lambda": -0.1}, "gae_lambda"),
    ({"temperature": -1.0}, "temperature"), ({"target_kl": -1}, "target_kl"),
    ({"kl_estimator": "k4"}, "estimator"), ({"value_clip": 0}, "value_clip"),
    ({"dual_clip": 0.9}, "dual_clip"), ({"whiten_advantages": 1}, "whiten"),
    ({"target_kl": 1.0, "kl_coef": 0}, "target_kl"), ({"ppo_epoch": 4}, "'ppo_epoch'.*ppo_epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), CONFIG_ERRORS)
def test_impossible_options_are_refused_at_construction(options, message):
    for make in (
        lambda p: RLHFTrainer(p, reward, config=options),
        lambda p: create_rlhf_trainer(p, reward, **options),
    ):
        with pytest.raises(ValueError, match=message):
            make(tiny_model())


def test_defaults_and_attributes():
    policy, reference = tiny_model(), tiny_model(1)
    trainer = create_rlhf_trainer(
        policy, reward, {"ppo_epochs": 2}, kl_coef=0.2, ref_policy_model=reference
    )
    assert trainer.config == RLHFConfig(ppo_epochs=2, kl_coef=0.2)
    assert trainer.policy_model is policy and trainer.ref_policy_model is reference
    assert trainer.reward_model is reward and not reference.training
    d = RLHFConfig()
    assert (d.ppo_epochs, d.clip_epsilon, d.value_loss_coef, d.entropy_coef) == (4, 0.2, 0.1, 0.01)
    assert (d.kl_coef, d.reward_scale, d.batch_size, d.max_length) == (0.1, 1.0, 4, 512)
    assert (d.learning_rate, d.gamma, d.gae_lambda, d.max_grad_norm) == (1e-5, 0.99, 0.95, 1.0)


def test_a_policy_learns_what_is_rewarded():
    policy = tiny_llama().float()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.div_(10)

    def share_below_20(ids, masks, response_token_mask):
        return ((ids < 20) * response_token_mask).sum(1) / response_token_mask.sum(1)

    trainer = create_rlhf_trainer(
        policy, share_below_20, learning_rate=5e-3, max_new_tokens=4, eos_token_id=[],
        batch_size=8, kl_coef=0.01, gamma=1.0, ppo_epochs=2,
    )  # fmt: skip
    prompts = PROMPTS.repeat(4, 1)
    rewards = [trainer.train_step(prompts)["mean_reward"] for _ in range(30)]
    assert sum(rewards[:3]) / 3 < 0.55 and sum(rewards[-5:]) / 5 > 0.85
