"""The adapters of losses from hidden states: Liger and cut-cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from apt_kernels.integrations import cut_cross_entropy, liger


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal(got, wanted, *leaves):
    torch.testing.assert_close(got, wanted, check_dtype=False)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (got, wanted)]
    for a, b in zip(*grads, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


def gathered(hidden, weight, bias, ids):
    logits = hidden @ weight.T + bias
    return logits, logits.log_softmax(-1).gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("average", [False, True])
def test_liger_dpo(average):
    hidden, weight, bias = states(6, 5, 4), states(11, 4), states(11)
    target = torch.randint(0, 11, (6, 5))
    target[1, :2] = target[5, 3:] = -100
    mask = target != -100
    reference = [torch.randn(s).double() for s in ((6, 5, 4), (11, 4), (11,))]
    logits, logps = gathered(hidden, weight, bias, target)
    count = mask.sum(1) if average else torch.ones(6)
    sums = (logps * mask).sum(1) / count
    ref_sums = (gathered(*reference, target)[1] * mask).sum(1) / count
    margin = 0.3 * ((sums - ref_sums)[:3] - (sums - ref_sums)[3:])
    nll = -(logps * mask)[:3].sum() / mask[:3].sum()
    criterion = liger.LigerFusedLinearDPOLoss(
        beta=0.3, alpha=0.5, compute_nll_loss=True, average_log_prob=average
    )
    loss, more = criterion(weight, hidden, target, bias, *reference)
    assert_equal(loss, -logsigmoid(margin).mean() + 0.5 * nll, hidden, weight, bias)
    means = (logits[:3].mean(), logits[3:].mean())
    wanted = (sums[:3], sums[3:], *means, nll, *(0.3 * (sums - ref_sums)).chunk(2))
    torch.testing.assert_close(more, wanted, check_dtype=False, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^ref_input: expected a tensor"):
        criterion(weight, hidden, target, bias)
    free = liger.LigerFusedLinearDPOLoss(beta=0.3, use_ref_model=False, average_log_prob=average)
    margin = 0.3 * (sums[:3] - sums[3:])
    assert_equal(free(weight, hidden, target, bias)[0], -logsigmoid(margin).mean(), hidden, bias)


AGGREGATES = {
    "grpo": lambda x, mask: (x.sum(1) / mask.sum(1)).sum() / 4,
    "bnpo": lambda x, mask: x.sum() / mask.sum(),
    "dapo": lambda x, mask: x.sum() / 40,
    "dr_grpo": lambda x, mask: x.sum() / 4 / 9,
}


@pytest.mark.parametrize("loss_type", AGGREGATES)
def test_liger_grpo(loss_type):
    hidden, weight, bias = states(4, 6, 5), states(11, 5), states(11)
    ids = torch.randint(0, 11, (4, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [5]])
    advantages = torch.randn(4).double()
    logps = gathered(hidden / 0.7, weight, bias / 0.7, ids)[1]
    old, ref = (logps.detach() + 0.2 * torch.randn(4, 6) for _ in range(2))
    ratio, A = (logps - old).exp(), advantages.unsqueeze(1)
    kl = (ref - logps).exp() - 1 - (ref - logps)
    tokens = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A) + 0.04 * kl
    wanted = AGGREGATES[loss_type](tokens * mask, mask)
    criterion = liger.LigerFusedLinearGRPOLoss(
        epsilon_high=0.3, loss_type=loss_type, max_completion_length=9, temperature=0.7
    )
    rest = {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": 40}
    loss, (mean_kl, clipped) = criterion(hidden, weight, ids, mask, advantages, bias, **rest)
    torch.testing.assert_close(loss, wanted, check_dtype=False)
    assert_equal(loss, wanted, hidden, weight, bias)
    torch.testing.assert_close(mean_kl, (kl * mask).sum() / mask.sum(), check_dtype=False)
    outside = ((ratio < 0.8) & (A < 0)) | ((ratio > 1.3) & (A > 0))
    assert clipped.item() == pytest.approx((outside & mask).sum().item() / mask.sum().item())
    with pytest.raises(ValueError, match=r"^ref_per_token_logps: expected a tensor"):
        criterion(hidden, weight, ids, mask, advantages, bias)


def test_the_bound_of_ligers_cispo_is_the_bound_itself():
    hidden, weight, ids = states(2, 3, 5), states(11, 5), torch.randint(0, 11, (2, 3))
    logps = gathered(hidden, weight, torch.zeros(11), ids)[1]
    old = logps.detach() - torch.tensor([[0.0, 1.0, 2.0], [-1.0, 3.0, 0.5]])
    advantages = torch.randn(2).double()
    options = {"loss_type": "cispo", "epsilon_high": 3.0, "use_ref_model": False}
    criterion = liger.LigerFusedLinearGRPOLoss(**options)
    mask = torch.ones(2, 3)
    loss, _ = criterion(hidden, weight, ids, mask, advantages, old_per_token_logps=old)
    factors = (logps - old).exp().clamp(max=3.0).detach() * advantages.unsqueeze(1)
    assert_equal(loss, -(factors * logps).mean(), hidden, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type"),
        ({"loss_type": "luspo"}, "loss_type"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"delta": 1.1}, "delta"),
        (
            {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
            "use_bias_correction_kl",
        ),
    ],
)
def test_options_of_liger_that_are_not_served(options, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        liger.LigerFusedLinearGRPOLoss(**options)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cut_cross_entropy(softcap, shift, reduction):
    e, c, bias = states(3, 5, 4), states(11, 4), states(11)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 3] = targets[2, 4] = -100
    logits = e @ c.T + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits, labels = logits[:, : 5 - int(shift)], targets[:, int(shift) :]
    wanted = cross_entropy(logits.mT, labels, reduction=reduction)
    weights = torch.rand_like(wanted)
    options = {"bias": bias, "softcap": softcap, "reduction": reduction, "shift": shift}
    got = cut_cross_entropy.linear_cross_entropy(e, c, targets, **options)
    torch.testing.assert_close(got, wanted)
    assert_equal((got * weights).sum(), (wanted * weights).sum(), e, c, bias)
    loss, lse = cut_cross_entropy.linear_cross_entropy(e, c, targets, **options, return_lse=True)
    lse_wanted = torch.where(labels != -100, logits.logsumexp(-1), 0.0)
    torch.testing.assert_close((loss, lse), (wanted, lse_wanted))
    total = (wanted * weights).sum() + (lse_wanted**2).sum()
    assert_equal((loss * weights).sum() + (lse**2).sum(), total, e, c, bias)


def test_cut_cross_entropy_refuses():
    e, c, targets = states(3, 4), states(11, 4), torch.randint(0, 11, (3,))
    for options in ({"vocab_parallel_options": object()}, {"shift": 3}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
            cut_cross_entropy.linear_cross_entropy(e, c, targets, **options)
