"""The reference of the policy losses against formulas written a second way."""

import math

import pytest
import torch

from apt_kernels import reference
from support.oracles import gradients, leaf, randn, spoil


def _surrogate_by_hand(kind, logp, old, a, low, high, dual, taus, ratio=None):
    """(loss, d loss / d logp) of a token; PPO in its two-term form."""
    r = math.exp(logp - old) if ratio is None else ratio
    if kind == "clip":
        first, second = r * a, min(max(r, 1 - low), 1 + high) * a
        value = min(first, second)
        slope = a * r if first <= second else 0.0
        if dual is not None and a < 0 and value < dual * a:
            value, slope = dual * a, 0.0
        return -value, -slope
    if kind == "cispo":
        weight = min(max(r, 1 - low), 1 + high)
        return -weight * a * logp, -weight * a
    if kind == "sapo":
        t = taus[0] if a > 0 else taus[1]
        gate = 1 / (1 + math.exp(-t * (r - 1)))
        return -4 / t * gate * a, -4 * gate * (1 - gate) * r * a
    return -a * logp, -a


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_token_advantages", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["clip", "dual", "cispo", "sapo", "reinforce"])
def test_policy_loss_by_hand(kind, level, per_token_advantages, weighted):
    rows, length = 5, 7
    mask = torch.rand(rows, length) > 0.3
    mask[0], mask[1] = False, True
    old = randn(rows, length, grad=False)
    logps = (old + 0.7 * torch.randn(rows, length)).requires_grad_()
    advantages = (
        randn(rows, length, grad=False) if per_token_advantages else randn(rows, grad=False)
    )
    weights = torch.rand(rows, length, dtype=torch.float64) + 0.5 if weighted else None
    dual = 1.4 if kind == "dual" else None
    loss_type = "clip" if kind == "dual" else kind
    options = dict(loss_type=loss_type, clip_low=0.15, clip_high=0.25, dual_clip=dual)
    if kind == "sapo":
        options |= dict(sapo_temperature_pos=1.2, sapo_temperature_neg=1.6)
    loss, metrics = reference.policy_loss(
        logps, old, advantages, mask, ratio_level=level, rollout_weights=weights,
        aggregation="token_sum", **options,
    )  # fmt: skip
    (grad,) = gradients(loss, logps)
    total, count, clipped, dual_clipped, k1, k3 = 0.0, 0, 0, 0, 0.0, 0.0
    for i in range(rows):
        tokens = [t for t in range(length) if mask[i, t]]
        x = [(logps[i, t] - old[i, t]).item() for t in tokens]
        ratio = math.exp(sum(x) / len(x)) if level == "sequence" and tokens else None
        for t, log_ratio in zip(tokens, x, strict=True):
            a = advantages[i, t].item() if per_token_advantages else advantages[i].item()
            value, slope = _surrogate_by_hand(
                loss_type, logps[i, t].item(), old[i, t].item(), a, 0.15, 0.25, dual,
                (1.2, 1.6), ratio,
            )  # fmt: skip
            w = weights[i, t].item() if weighted else 1.0
            total += w * value
            assert grad[i, t].item() == pytest.approx(w * slope, rel=1e-9, abs=1e-12)
            r = math.exp(log_ratio) if ratio is None else ratio
            outside = r > 1.25 or r < 0.85
            count += 1
            clipped += {
                "clip": (a > 0 and r > 1.25) or (a < 0 and r < 0.85), "cispo": outside
            }.get(loss_type, False)  # fmt: skip
            dual_clipped += dual is not None and a < 0 and r > dual
            k1, k3 = k1 - log_ratio, k3 + math.exp(log_ratio) - 1 - log_ratio
    assert (grad[~mask] == 0).all()
    expected = {
        "policy_loss": total, "clip_fraction": clipped / count,
        "dual_clip_fraction": dual_clipped / count, "ppo_kl": k1 / count, "approx_kl": k3 / count,
        "ref_kl": 0.0, "entropy": 0.0,
    }  # fmt: skip
    assert loss.item() == pytest.approx(total, rel=1e-9)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-9)
    if kind in ("clip", "cispo"):
        assert clipped > 0
    if kind == "dual" and level == "token":
        assert dual_clipped > 0


def test_policy_loss_aggregations():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    logps, entropy = spoil(-torch.rand(3, 4), mask), spoil(torch.rand(3, 4), mask)
    old, ref = spoil(-torch.rand(3, 4), mask).detach(), spoil(-torch.rand(3, 4), mask).detach()
    adv = spoil(torch.randn(3, 4), mask).detach()
    weights = spoil(torch.rand(3, 4), mask).detach()
    surrogate, tokens = {}, [(0, 0), (0, 1), (0, 2), (1, 0)]
    for i, t in tokens:
        r = math.exp((logps[i, t] - old[i, t]).item())
        a = adv[i, t].item()
        surrogate[i, t] = -min(r * a, min(max(r, 0.8), 1.2) * a) * weights[i, t].item()
    kl = {s: 0.5 * (logps[s] - ref[s]).item() ** 2 for s in tokens}
    losses = {s: surrogate[s] + 0.3 * kl[s] - 0.1 * entropy[s].item() for s in tokens}
    sums = {
        "token_mean": lambda x: sum(x.values()) / 4,
        "token_sum": lambda x: sum(x.values()),
        "sequence_mean": lambda x: (sum(x[0, t] for t in range(3)) / 3 + x[1, 0]) / 2,
        "sequence_sum": lambda x: sum(x.values()) / 2,
        "dr_grpo": lambda x: sum(x.values()) / 8,
    }
    denominators = dict(token_mean=4, token_sum=1, sequence_mean=2, sequence_sum=2, dr_grpo=8)
    for aggregation, by_hand in sums.items():
        options = dict(
            ref_logps=ref, kl_coef=0.3, kl_estimator="k2", entropy=entropy, entropy_coef=0.1,
            rollout_weights=weights, aggregation=aggregation,
        )  # fmt: skip
        loss, metrics = reference.policy_loss(logps, old, adv, mask, **options)
        assert loss.item() == pytest.approx(by_hand(losses), rel=1e-5)
        assert metrics["policy_loss"].item() == pytest.approx(by_hand(surrogate), rel=1e-5)
        assert metrics["ref_kl"].item() == pytest.approx(sum(kl.values()) / 4, rel=1e-5)
        mean_entropy = sum(entropy[s].item() for s in tokens) / 4
        assert metrics["entropy"].item() == pytest.approx(mean_entropy, rel=1e-5)
        for normalizer in (10.0, torch.tensor(10.0)):
            other, _ = reference.policy_loss(
                logps, old, adv, mask, normalizer=normalizer, **options
            )
            torch.testing.assert_close(other * 10, loss * denominators[aggregation])
        for grad in gradients(loss, logps, entropy):
            assert (grad[~mask] == 0).all() and (grad[mask] != 0).any() and grad.isfinite().all()


def test_log_ratio_is_bounded():
    logps = torch.tensor([[0.0, -500.0, -3.0]], requires_grad=True)
    old = torch.tensor([[-500.0, 0.0, -3.0]])
    for level in ("token", "sequence"):
        loss, metrics = reference.policy_loss(
            logps, old, torch.tensor([-1.0]), torch.ones(1, 3).bool(), ratio_level=level
        )
        assert loss.isfinite() and all(m.isfinite() for m in metrics.values())
        assert gradients(loss, logps)[0].isfinite().all()
    loss, _ = reference.policy_loss(logps, old, torch.tensor([-1.0]), torch.ones(1, 3).bool())
    assert loss.item() == pytest.approx((math.exp(20) + 0.8 + 1) / 3)
    assert gradients(loss, logps)[0][0, :2].tolist() == [0, 0]


def test_on_policy_needs_no_old_logps():
    logps, mask = randn(3, 4), torch.rand(3, 4) > 0.3
    advantages = randn(3, grad=False)
    for options in (dict(), dict(loss_type="cispo"), dict(ratio_level="sequence")):
        a, _ = reference.policy_loss(logps, None, advantages, mask, **options)
        b, _ = reference.policy_loss(logps, logps.detach(), advantages, mask, **options)
        assert torch.equal(a, b)
        assert torch.equal(*gradients(a, logps), *gradients(b, logps))


def test_linear_policy_loss_is_the_loss_of_the_logits():
    hidden, weight, bias = randn(3, 4, 5), randn(6, 5), randn(6)
    ids, mask = torch.randint(0, 6, (3, 4)), torch.rand(3, 4) > 0.3
    old, advantages = randn(3, 4, grad=False) - 2, randn(3, grad=False)
    got, metrics = reference.linear_policy_loss(
        hidden, weight, ids, old, advantages, mask, bias=bias, temperature=1.3, entropy_coef=0.2,
        ref_logps=old, kl_coef=0.1, aggregation="sequence_mean",
    )  # fmt: skip
    log_p = ((hidden @ weight.T + bias) / 1.3).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected, _ = reference.policy_loss(
        log_p.gather(-1, ids[..., None])[..., 0], old, advantages, mask, entropy=entropy,
        entropy_coef=0.2, ref_logps=old, kl_coef=0.1, aggregation="sequence_mean",
    )  # fmt: skip
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(metrics["entropy"], entropy[mask].mean().detach())
    for a, b in zip(
        gradients(got, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_value_loss_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    values = spoil(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 9.0]]), mask)
    returns = spoil(torch.tensor([[0.3, 0.0, 4.0], [0.0, 0.5, 9.0]]), mask).detach()
    old = spoil(torch.tensor([[0.0, 0.0, 0.0], [3.1, 0.2, 9.0]]), mask).detach()
    loss, metrics = reference.value_loss(values, returns, mask, old_values=old, clip_range=0.2)
    # v' = 0, 0.2, 0.2, 3.0, 0.4: the third and the fifth are further from their return than v
    terms = [0.3**2, 1.0, (0.2 - 4) ** 2, 9.0, 0.1**2]
    torch.testing.assert_close(loss.item(), sum(terms) / 10, rtol=1e-6, atol=0)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 5)
    (grad,) = gradients(loss, values)
    torch.testing.assert_close(grad, torch.tensor([[-0.06, 0.2, 0.0], [0.6, 0.0, 0.0]]))
    r, v = returns[mask].double(), values[mask].double()
    explained = 1 - (r - v).var() / r.var()
    assert metrics["explained_variance"].item() == pytest.approx(explained.item(), rel=1e-5)
    plain, metrics = reference.value_loss(values, returns, mask)
    assert plain.item() == pytest.approx(((r - v) ** 2).mean().item() / 2)
    assert metrics["clip_fraction"] == 0
    constant = reference.value_loss(values, torch.ones(2, 3), mask)[1]["explained_variance"]
    assert constant == 0


def test_kl_penalty_by_hand():
    logps, ref = leaf([-1.0, -2.0, -0.5, -30.0, 0.0]), leaf([-1.5, -0.1, -0.5, 0.0, -30.0]).detach()
    d = (logps - ref).tolist()
    for estimator, value, slope in (
        ("k1", lambda x: x, lambda x: 1.0),
        ("k2", lambda x: x * x / 2, lambda x: x),
        ("k3", lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
    ):
        got = reference.kl_penalty(logps, ref, estimator)
        bounded = [max(-20.0, min(20.0, x)) if estimator == "k3" else x for x in d]
        assert got.tolist() == pytest.approx([value(x) for x in bounded], abs=1e-12)
        (grad,) = gradients(got.sum(), logps)
        slopes = [slope(x) if x == y else 0.0 for x, y in zip(d, bounded, strict=True)]
        assert grad.tolist() == pytest.approx(slopes, abs=1e-12)
    small = reference.kl_penalty(torch.tensor([1e-3]), torch.tensor([0.0]))
    assert small.item() == pytest.approx(math.exp(-1e-3) - 1 + 1e-3, rel=1e-3)  # no cancellation


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 4.0, 4.0, 7.0, 0.1, 0.1, 0.1, 0.1])
    equal = [0.0] * 4
    std = math.sqrt(18 / 3)
    for kind, expected in {
        "relative": [-3.0, 0, 0, 3],
        "normalized": [-3 / std, 0, 0, 3 / std],
        "rank": [(0 - 1.5) / 2, 0, 0, (3 - 1.5) / 2],
        "leave_one_out": [1 - 5, 0, 0, 7 - 3],
    }.items():
        got = reference.group_advantages(rewards, 4, kind)
        assert got[:4].tolist() == pytest.approx(expected, rel=1e-6)
        assert got[4:].tolist() == equal, kind  # exactly, for any rounding of the mean
        assert reference.group_advantages(rewards, 1, kind).tolist() == [0.0] * 8
        assert reference.group_advantages(rewards[:0], 4, kind).shape == (0,)
    thirds = torch.linspace(0.1, 1.7, 50).repeat_interleave(3)  # their means are rounded
    assert (reference.group_advantages(thirds, 3, "normalized") == 0).all()
    eps = reference.group_advantages(rewards, 4, "normalized", eps=0.5)
    assert eps[0].item() == pytest.approx(-3 / (std + 0.5))
    assert reference.group_advantages(torch.tensor([3, 1]), 2, "rank").tolist() == [0.5, -0.5]
