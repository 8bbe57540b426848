"""The reference of the preference losses against formulas written a second way."""

import math

import pytest
import torch

from apt_kernels import reference
from apt_kernels.reference.numerics import log1mexp
from support.oracles import DPO_TYPES, gradients, leaf, randn, spoil


def test_sequence_logps_by_hand():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    logps = spoil(torch.tensor([[1.0, 9, 2], [9, 9, 9], [1, 2, 4]]), mask)
    assert reference.sequence_logps(logps, mask).tolist() == [3.0, 0.0, 7.0]
    averages = reference.sequence_logps(logps, mask, average=True)
    torch.testing.assert_close(averages, torch.tensor([1.5, 0.0, 7 / 3]))
    (grad,) = gradients(averages.sum(), logps)
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0, 0.5], [0, 0, 0], [1 / 3] * 3]))


def _dpo_by_hand(kind, pc, pr, rc, rr, b, s, lengths):
    """One pair, in plain Python; `pc` to `rr` are the summed log-probabilities."""
    c, r = pc - rc, pr - rr
    d = c - r

    def sig(x):
        return 1 / (1 + math.exp(-x))

    def log_odds(p):
        return math.log(math.exp(p) / (1 - math.exp(p)))

    def smoothed(x):
        return -(1 - s) * math.log(sig(x)) - s * math.log(sig(-x))

    normed = c / lengths[0] - r / lengths[1]
    tau = 0.05
    return {
        "sigmoid": lambda: smoothed(b * d),
        "robust": lambda: (
            (-(1 - s) * math.log(sig(b * d)) + s * math.log(sig(-b * d))) / (1 - 2 * s)
        ),
        "hinge": lambda: max(0.0, 1 - b * d),
        "ipo": lambda: (normed - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: (
            sig(b * d) * math.log(sig(b * d) / (1 - s)) + sig(-b * d) * math.log(sig(-b * d) / s)
        ),
        "nca_pair": lambda: (
            -math.log(sig(b * c)) - math.log(sig(-b * c)) / 2 - math.log(sig(-b * r)) / 2
        ),
        "bco_pair": lambda: -math.log(sig(b * c)) - math.log(sig(-b * r)),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - sig(b * c) + sig(b * r),
        "apo_down": lambda: sig(b * c) + 1 - sig(b * d),
        "discopop": lambda: (
            -math.log(sig(b * d)) * (1 - sig(b * d / tau)) + math.exp(-b * d) * sig(b * d / tau)
        ),
        "sigmoid_norm": lambda: smoothed(b * normed),
        "simpo": lambda: smoothed(b * (pc - pr) - 0.5),
        "orpo": lambda: -b * math.log(sig(log_odds(pc) - log_odds(pr))),
    }[kind]()


@pytest.mark.parametrize(
    "kind", [t for t in DPO_TYPES if t not in ("kto_pair", "aot", "aot_unpaired")]
)
def test_dpo_loss_by_hand(kind):
    pairs = -3 * torch.rand(4, 6, dtype=torch.float64) - 0.05
    lengths = torch.randint(1, 9, (2, 6))
    options = dict(beta=0.3, loss_type=kind, label_smoothing=0.15)
    if kind in ("ipo", "sigmoid_norm"):
        options |= dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    refs = () if kind in ("simpo", "orpo") else (pairs[2], pairs[3])
    losses, chosen, rejected = reference.dpo_loss(
        pairs[0], pairs[1], *refs, reduction="none", **options
    )
    expected = [
        _dpo_by_hand(kind, *pairs[:, i].tolist(), 0.3, 0.15, lengths[:, i].tolist())
        for i in range(6)
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    offset = torch.zeros(2, 6) if not refs else pairs[2:]
    torch.testing.assert_close(chosen, 0.3 * (pairs[0] - offset[0]))
    torch.testing.assert_close(rejected, 0.3 * (pairs[1] - offset[1]))
    for reduction, value in (("mean", sum(expected) / 6), ("sum", sum(expected))):
        loss = reference.dpo_loss(pairs[0], pairs[1], *refs, reduction=reduction, **options)[0]
        assert loss.item() == pytest.approx(value, rel=1e-12)


def test_dpo_aot_compares_sorted_margins():
    pc, pr, rc, rr = (
        torch.tensor(x).double() for x in ([3.0, 1, 2], [0.0, 0, 0], [0, 5.0, 1], [0.0] * 3)
    )
    sigmoid = dict(beta=1.0, reduction="none", reference_free=True)
    for kind, first, second in (
        ("aot", [1, 2, 3], [0, 1, 5]),
        ("aot_unpaired", [-4, 1, 3], [0, 0, 0]),
    ):
        got = reference.dpo_loss(pc, pr, rc, rr, loss_type=kind, beta=1.0, reduction="none")[0]
        expected = reference.dpo_loss(
            torch.tensor(first).double(), torch.tensor(second).double(), **sigmoid
        )[0]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rejected, z_r", [([-1.0, -2.0], 0.0), ([0.2, 0.6], 0.4)])
def test_dpo_kto_pair_by_hand(rejected, z_r):
    c, r = leaf([0.5, 0.1]), leaf(rejected)
    losses, _, _ = reference.dpo_loss(
        c, r, loss_type="kto_pair", beta=0.4, reduction="none", reference_free=True
    )
    z_c = 0.3  # the batch mean of c; z_r that of r, at least 0

    def sig(x):
        return 1 / (1 + math.exp(-x))

    for i, (a, b) in enumerate(zip(c.tolist(), r.tolist(), strict=True)):
        expected = (1 - sig(0.4 * (a - z_r)) + 1 - sig(0.4 * (z_c - b))) / 2
        assert losses[i].item() == pytest.approx(expected, rel=1e-12)
        grad_c, grad_r = (g[i].item() for g in gradients(losses[i], c, r))
        slope = sig(0.4 * (a - z_r)) * sig(-0.4 * (a - z_r))
        assert grad_c == pytest.approx(-0.2 * slope, rel=1e-9)  # z has no gradient
        slope = sig(0.4 * (z_c - b)) * sig(-0.4 * (z_c - b))
        assert grad_r == pytest.approx(0.2 * slope, rel=1e-9)


def test_preference_losses_far_from_zero():
    """Margins of thousands, as sums of log-probabilities give: finite, with finite gradients."""
    for kind in DPO_TYPES:
        if kind == "discopop":  # e^-l is meant to explode for tau > 1; 0.05 must not
            assert reference.dpo_loss(*torch.tensor([[-900.0], [-0.5]]), loss_type=kind)[0] < 1e4
        pc = torch.tensor([-2000.0, -1e-4, -0.5, -1500.0], requires_grad=True)
        pr = torch.tensor([-1e-4, -2000.0, -0.5, -1400.0], requires_grad=True)
        loss, *_ = reference.dpo_loss(pc, pr, loss_type=kind, label_smoothing=0.1, beta=1.0)
        assert loss.isfinite(), kind
        assert all(g.isfinite().all() for g in gradients(loss, pc, pr)), kind


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = [-1e-9, -1e-3, -0.5, -0.7, -3.0, -40.0, -600.0]
    got = log1mexp(torch.tensor(x, dtype=torch.float64)).tolist()
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x]
    assert got == pytest.approx(expected, rel=1e-14, abs=0)


def test_reference_free_takes_the_reference_as_zero():
    x = randn(4, 3)
    free = reference.dpo_loss(*x, reference_free=True)
    for a, b in zip(free, reference.dpo_loss(x[0], x[1]), strict=True):
        assert torch.equal(a, b)
    assert free[0] != reference.dpo_loss(*x)[0]


def test_bradley_terry_by_hand():
    chosen, rejected, margin = [2.0, -1.0], [0.5, 3.0], [0.1, 0.7]
    expected = [
        math.log(1 + math.exp(-(c - r - m))) + 0.01 * (c + r) ** 2
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    got = reference.bradley_terry_loss(
        leaf(chosen),
        leaf(rejected),
        margin=torch.tensor(margin),
        center_coef=0.01,
        reduction="none",
    )
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    assert reference.bradley_terry_loss(leaf(chosen), leaf(rejected), margin=0.25).item() == (
        pytest.approx((math.log1p(math.exp(-1.25)) + math.log1p(math.exp(4.25))) / 2)
    )


def test_linear_dpo_loss_is_the_loss_of_the_logits():
    hidden, weight, bias = randn(4, 5, 3), randn(7, 3), randn(7)
    ids, mask = torch.randint(0, 7, (4, 5)), torch.rand(4, 5) > 0.3
    mask[:, 0] = True
    refs = -torch.rand(2, 2, dtype=torch.float64) * 5
    got = reference.linear_dpo_loss(
        hidden, weight, ids, mask, *refs, bias=bias, temperature=0.8, loss_type="ipo", beta=0.3
    )
    log_p = ((hidden @ weight.T + bias) / 0.8).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    total = (log_p * mask).sum(-1)
    margin = (total[:2] - refs[0]) - (total[2:] - refs[1])
    expected = ((margin - 1 / 0.6) ** 2).mean()
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], 0.3 * (total[:2] - refs[0]).detach())
    for a, b in zip(
        gradients(got[0], hidden, weight, bias),
        gradients(expected, hidden, weight, bias),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
