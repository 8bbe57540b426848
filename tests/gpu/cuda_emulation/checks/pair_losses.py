"""dpo_loss and bradley_terry_loss: every type, reduction and size of the reduction."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from apt_kernels import reference
from apt_kernels.testing import assert_as_accurate

from .registry import FLOATS, check, randn

REDUCTIONS = ("none", "mean", "sum")
LOSS_TYPES = (  # in the order of their codes
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "simpo", "orpo"),
)
WITH_SMOOTHING = ("sigmoid", "robust", "exo_pair", "simpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
EXTRA = {"discopop": ("discopop_tau", 0.05), "simpo": ("simpo_gamma", 0.5)}


def _call(kernels, loss_type, inputs, reduction, beta, smoothing, extra) -> dict[str, Tensor]:
    refs = (*inputs[2:], None, None)[:2]
    codes = LOSS_TYPES.index(loss_type), REDUCTIONS.index(reduction)
    results = kernels.dpo_loss_fwd(*inputs[:2], *refs, *codes, beta, smoothing, extra, extra)
    return dict(zip(("loss", "chosen_rewards", "rejected_rewards", "grads"), results, strict=True))


def check_dpo_loss(kernels, loss_type, inputs, reduction, beta=0.1, smoothing=0.0, extra=0.0):
    """Loss, rewards and gradients; `inputs` are the four (or two) log-probabilities."""
    got = _call(kernels, loss_type, inputs, reduction, beta, smoothing, extra)

    def expected(dtype):
        leaves = [t.to(dtype).requires_grad_(i < 2) for i, t in enumerate(inputs)]
        options = {EXTRA[loss_type][0]: extra} if loss_type in EXTRA else {}
        if loss_type in WITH_SMOOTHING:
            options["label_smoothing"] = smoothing
        results = reference.dpo_loss(
            *leaves, beta=beta, loss_type=loss_type, reduction=reduction, **options
        )
        grads = torch.autograd.grad(results[0].sum(), leaves[:2])
        return dict(zip(got, (*results, torch.stack(grads)), strict=True))

    what = f"{loss_type}, {reduction}, {inputs[0].dtype}, {len(inputs[0])} pairs"
    _judge(got, expected(torch.float32), expected(torch.float64), what)


def check_bradley_terry(kernels, chosen, rejected, reduction, margin=None, center_coef=0.0):
    """Loss and gradients; `margin` is None, a number or a tensor."""
    tensor = isinstance(margin, Tensor)
    margins, number = (margin, 0.0) if tensor else (None, margin or 0.0)
    code = REDUCTIONS.index(reduction)
    results = kernels.bradley_terry_loss_fwd(chosen, rejected, margins, number, center_coef, code)

    def expected(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (chosen, rejected)]
        loss = reference.bradley_terry_loss(
            *leaves, margin=margin, center_coef=center_coef, reduction=reduction
        )
        return {"loss": loss, "grads": torch.stack(torch.autograd.grad(loss.sum(), leaves))}

    got = dict(zip(("loss", "grads"), results, strict=True))
    what = f"{reduction}, {chosen.dtype}, {len(chosen)} pairs"
    _judge(got, expected(torch.float32), expected(torch.float64), what)


def _judge(got: dict, plain: dict, wanted: dict, what: str) -> None:
    for name, result in got.items():
        assert_as_accurate(result, plain[name].detach(), wanted[name].detach(), f"{what}, {name}")


def _logps(loss_type: str, pairs: int, dtype=torch.float32, scale: float = 3.0) -> list[Tensor]:
    count = 2 if loss_type in WITHOUT_REFERENCE else 4
    inputs = [randn(pairs, seed=10 + i, scale=scale) - scale for i in range(count)]
    if loss_type == "orpo":  # averaged log-probabilities: below 0
        inputs = [-t.abs() - 1e-3 for t in inputs]
    return [t.to(dtype) for t in inputs]


def _dpo_loss(kernels, loss_type: str) -> None:
    smoothing = 0.1 if loss_type in WITH_SMOOTHING else 0.0
    extra = EXTRA.get(loss_type, ("", 0.0))[1]
    for reduction in REDUCTIONS:
        for dtype in FLOATS.values():
            for pairs, scale in ((37, 5.0), (513, 50.0)):
                inputs = _logps(loss_type, pairs, dtype, scale)
                check_dpo_loss(kernels, loss_type, inputs, reduction, 0.3, smoothing, extra)
    inputs = _logps(loss_type, 64, scale=2000.0)  # saturated sigmoids
    check_dpo_loss(kernels, loss_type, inputs, "none", 1.0, smoothing, extra)

    # One pair gives what it gives among many, whatever the reduction.
    inputs = _logps(loss_type, 37)
    among_many = _call(kernels, loss_type, inputs, "none", 0.3, smoothing, extra)
    for reduction in REDUCTIONS:
        first = [t[:1] for t in inputs]
        alone = _call(kernels, loss_type, first, reduction, 0.3, smoothing, extra)
        for name, one in alone.items():
            assert torch.equal(one.flatten(), among_many[name][..., :1].flatten()), name


for _type in LOSS_TYPES:
    check(f"dpo_loss-{_type}")(functools.partial(_dpo_loss, loss_type=_type))


@check()
def dpo_options(kernels):
    inputs = _logps("sigmoid", 65)
    for reduction in REDUCTIONS:
        check_dpo_loss(kernels, "sigmoid", inputs[:2], reduction)
        check_dpo_loss(kernels, "sigmoid", inputs, reduction, smoothing=0.25)
    check_dpo_loss(kernels, "discopop", inputs, "sum", beta=1.0, extra=3.0)
    hinge = [torch.tensor([4.0, 5.0, 6.0]), torch.tensor([3.0, 3.0, 3.0])]
    check_dpo_loss(kernels, "hinge", hinge, "none", beta=0.5)  # the middle one is the corner


@check()
def many_pairs(kernels):
    """Around the sizes at which the reduction takes a second launch and a grid stride."""
    for pairs in (8191, 8192, 8193, 300_001):
        for reduction in REDUCTIONS:
            inputs = _logps("sigmoid", pairs)
            check_dpo_loss(kernels, "sigmoid", inputs, reduction)
            check_bradley_terry(kernels, *inputs[:2], reduction, 0.5)


@check(small=True)
def several_blocks(kernels):
    """One block, and as few as take a second launch."""
    for pairs in (70, 8193):
        check_dpo_loss(kernels, "ipo", _logps("ipo", pairs), "mean")


@check()
def no_pairs(kernels):
    for reduction in REDUCTIONS:
        for loss_type in LOSS_TYPES:
            check_dpo_loss(kernels, loss_type, _logps(loss_type, 0), reduction, extra=0.5)
        check_bradley_terry(kernels, torch.empty(0), torch.empty(0), reduction)


@check()
def nan_pairs(kernels):
    for loss_type in LOSS_TYPES:
        inputs = _logps(loss_type, 5)
        inputs[0][2] = torch.nan
        loss = _call(kernels, loss_type, inputs, "none", 0.1, 0.1, 0.5)["loss"]
        assert math.isnan(loss[2]) and torch.isfinite(loss[[0, 1, 3, 4]]).all(), loss_type


@check()
def bradley_terry(kernels):
    for dtype in FLOATS.values():
        for pairs, scale in ((1, 1.0), (37, 3.0), (700, 30.0)):
            chosen = randn(pairs, seed=1, scale=scale).to(dtype)
            rejected = randn(pairs, seed=2, scale=scale).to(dtype)
            margins = randn(pairs, seed=3).abs()
            for reduction in REDUCTIONS:
                check_bradley_terry(kernels, chosen, rejected, reduction)
                check_bradley_terry(kernels, chosen, rejected, reduction, 0.7, 0.01)
                check_bradley_terry(kernels, chosen, rejected, reduction, margins, 0.01)
