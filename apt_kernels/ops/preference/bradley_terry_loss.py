"""The loss of a reward model on preference pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import REDUCTIONS
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients, keep, scaled
from ..common.module import LossModule

KERNEL = "bradley_terry_loss_fwd"
dispatch.define(
    "bradley_terry_loss_fwd(Tensor chosen_rewards, Tensor rejected_rewards, "
    "Tensor? margin_tensor, float margin, float center_coef, int reduction) -> (Tensor, Tensor)"
)
dispatch.register("bradley_terry_loss", KERNEL)


class BradleyTerryLossCall(NamedTuple):
    """The arguments of the kernel: contiguous pairs `(B,)` of one dtype, and options as numbers."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margin_tensor: Tensor | None
    margin: float
    center_coef: float
    reduction: int


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The loss -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2.

    One pass forms the loss and the gradients; the backward pass scales them. Sources: Bradley &
    Terry 1952; Ouyang 2022 (reward models); Touvron 2023 (margins); Eisenstein 2023 (centring).

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
    checks.choice("reduction", reduction, REDUCTIONS)
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
    shape, dtype = chosen_rewards.shape, chosen_rewards.dtype
    if rejected_rewards.dtype != dtype:
        dtype = accumulate_dtype(chosen_rewards)
        chosen_rewards, rejected_rewards = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    margin_tensor = None
    if isinstance(margin, Tensor):
        margin_tensor = margin.to(accumulate_dtype(chosen_rewards)).reshape(-1).contiguous()
        margin = None
    if len(shape) != 1:
        chosen_rewards, rejected_rewards = chosen_rewards.reshape(-1), rejected_rewards.reshape(-1)
    call = BradleyTerryLossCall(
        chosen_rewards.contiguous(),
        rejected_rewards.contiguous(),
        margin_tensor,
        margin=0.0 if margin is None else float(margin),
        center_coef=float(center_coef),
        reduction=REDUCTIONS[reduction],
    )
    loss = _BradleyTerryLoss.apply(*call, backend)
    return loss.reshape(shape) if len(shape) != 1 and reduction == "none" else loss


class _BradleyTerryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = BradleyTerryLossCall._make(fields)
        loss, formed = dispatch.kernel(KERNEL, backend)(*call)
        keep(ctx, formed, call, call.chosen_rewards, call.rejected_rewards, call.margin_tensor)
        ctx.dtype, ctx.backend = call.chosen_rewards.dtype, backend
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss):
        grads = scaled(ctx, grad_loss, lambda call: dispatch.kernel(KERNEL, ctx.backend)(*call)[1])
        if grads.dtype != ctx.dtype:
            grads = grads.to(ctx.dtype)
        grad_chosen, grad_rejected = grads.unbind()
        return gradients(
            BradleyTerryLossCall, chosen_rewards=grad_chosen, rejected_rewards=grad_rejected
        )


@dispatch.fake(KERNEL)
def _(*fields):
    call = BradleyTerryLossCall(*fields)
    rewards = call.chosen_rewards
    dtype = accumulate_dtype(rewards)
    reduced = call.reduction != REDUCTIONS["none"]
    loss = rewards.new_empty(() if reduced else rewards.shape, dtype=dtype)
    return loss, loss.new_empty((2, *rewards.shape))


class BradleyTerryLoss(LossModule):
    """`bradley_terry_loss` as a module. Its arguments are the options of the function."""

    def __init__(
        self,
        margin: float | None = None,
        center_coef: float = 0.0,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        checks.at_least_zero("center_coef", center_coef)
        checks.choice("reduction", reduction, REDUCTIONS)
        super().__init__(
            margin=margin, center_coef=center_coef, reduction=reduction, backend=backend
        )

    def forward(
        self, chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None
    ) -> Tensor:
        """The loss; `margin` of these pairs, where given, instead of the module's."""
        options = self.options if margin is None else {**self.options, "margin": margin}
        return bradley_terry_loss(chosen_rewards, rejected_rewards, **options)
