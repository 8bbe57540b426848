"""The loss of a reward model on preference pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import keep, scaled
from ..common.once import differentiable_once

KERNEL = "bradley_terry_loss_fwd"
dispatch.register("bradley_terry_loss", KERNEL)

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2, reduced.

    One pass forms the loss and the gradients; backward scales them. Sources: Bradley & Terry 1952;
    Ouyang 2022 (reward models); Touvron 2023 (margins); Eisenstein 2023 (centring).

    Args:
        chosen_rewards: any shape, `(B,)` or `(B, 1)` say; float32, bfloat16, float16 or float64;
            any strides; differentiable.
        rejected_rewards: the same shape; differentiable.
        margin: a number, or one per pair in the shape of the rewards (no gradient), or None for 0.
        center_coef: weight of the term that keeps the rewards of a pair centred at 0.
        reduction: "mean" (0 for no pairs), "sum" or "none".
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, 0-dim, or in the shape of the rewards for "none"; float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("chosen_rewards", chosen_rewards)
    checks.pair("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)
    if isinstance(margin, Tensor):
        checks.pair("margin", margin, "chosen_rewards", chosen_rewards, constant_=True)
    elif margin is not None:
        checks.finite("margin", margin)
    checks.at_least_zero("center_coef", center_coef)
    checks.choice("reduction", reduction, _REDUCTIONS)
    backend = dispatch.choose(
        "bradley_terry_loss", chosen_rewards.device, backend, chosen_rewards.dtype
    )
    if backend == "reference":
        return reference.bradley_terry_loss(
            chosen_rewards,
            rejected_rewards,
            margin=margin,
            center_coef=center_coef,
            reduction=reduction,
        )
    chosen, rejected, margins = chosen_rewards, rejected_rewards, None
    if chosen.dtype != rejected.dtype:
        dtype = accumulate_dtype(chosen)
        chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    if isinstance(margin, Tensor):
        margins, margin = margin.to(accumulate_dtype(chosen)).reshape(-1).contiguous(), None
    several = chosen.dim() != 1
    loss = _BradleyTerryLoss.apply(
        (chosen.reshape(-1) if several else chosen).contiguous(),
        (rejected.reshape(-1) if several else rejected).contiguous(),
        margins,
        0.0 if margin is None else float(margin),
        float(center_coef),
        _REDUCTIONS[reduction],
        backend,
    )
    return loss.reshape(chosen.shape) if several and reduction == "none" else loss


class BradleyTerryLoss(nn.Module):
    """`bradley_terry_loss` as a module; its arguments are those of the function."""

    def __init__(
        self,
        margin: float | None = None,
        center_coef: float = 0.0,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.at_least_zero("center_coef", center_coef)
        checks.choice("reduction", reduction, _REDUCTIONS)
        self.margin, self.center_coef = margin, center_coef
        self.reduction, self.backend = reduction, backend

    def forward(
        self, chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None
    ) -> Tensor:
        """The loss; `margin` of these pairs, where given, instead of the module's."""
        return bradley_terry_loss(
            chosen_rewards,
            rejected_rewards,
            margin=self.margin if margin is None else margin,
            center_coef=self.center_coef,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, center_coef={self.center_coef}, reduction={self.reduction!r}"


class _BradleyTerryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, rejected, margins, margin, center_coef, reduction, backend):
        loss, grads = dispatch.kernel(KERNEL, backend)(
            chosen, rejected, margins, margin, center_coef, reduction
        )
        keep(ctx, grads, chosen, rejected, margins)
        ctx.dtype, ctx.options = chosen.dtype, (margin, center_coef, reduction, backend)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss):
        *options, backend = ctx.options
        kernel = dispatch.kernel(KERNEL, backend)
        grads = scaled(ctx, grad_loss, lambda *inputs: kernel(*inputs, *options)[1])
        if grads.dtype != ctx.dtype:
            grads = grads.to(ctx.dtype)
        grad_chosen, grad_rejected = grads.unbind()
        return grad_chosen, grad_rejected, None, None, None, None, None


@dispatch.fake(KERNEL)
def _(chosen, rejected, margins, margin, center_coef, reduction):
    dtype = accumulate_dtype(chosen)
    loss = chosen.new_empty(chosen.shape if reduction == 0 else (), dtype=dtype)
    return loss, loss.new_empty((2, *chosen.shape))
