"""The loss of value functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import AGGREGATIONS
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients
from ..common.module import LossModule
from ..common.token_inputs import adjacent, alike, boolean, normalizer_tensor

KERNEL = "value_loss_fwd"
dispatch.define(
    "value_loss_fwd(Tensor values, Tensor returns, Tensor mask, Tensor? old_values, "
    "Tensor? normalizer, int aggregation, float clip_range) -> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("value_loss", KERNEL)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The aggregate of (v - R)^2 / 2, with clipping of max((v - R)^2, (v' - R)^2) / 2, and metrics.

    R are the returns and v' = clamp(v, old_values - clip_range, old_values + clip_range). One pass
    forms the loss, the metrics and the gradient; the backward pass scales the gradient. Sources:
    Schulman 2017, Dhariwal 2017.

    Args:
        values: `(B, T)` float32, bfloat16, float16 or float64; any strides; differentiable. A
            masked token may hold anything, in any argument; its gradient is exactly 0.
        returns: `(B, T)`.
        mask: `(B, T)`, True counts. Where nothing counts the loss is 0, with a graph.
        old_values: `(B, T)`, the values at sampling time; with `clip_range` only.
        clip_range: how far a value may move, above 0; None means no clipping.
        aggregation: as in `policy_loss`.
        normalizer: as in `policy_loss`.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, metrics)`, 0-dim float32 (float64 for float64 values). The metrics have no graph:
        clip_fraction, and explained_variance = 1 - Var(R - v) / Var(R) over the tokens that count,
        0 where their returns are all equal.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    _check_options(clip_range, aggregation)
    checks.tensor("values", values)
    checks.dims("values", values, 2)
    checks.pair("returns", returns, "values", values, constant_=True)
    checks.token_mask("mask", mask, "values", values)
    if clip_range is None:
        checks.unused("old_values", old_values, "there is no clip_range")
    else:
        checks.pair("old_values", old_values, "values", values, constant_=True)
    checks.normalizer(normalizer, "values", values)
    backend = dispatch.choose("value_loss", values.device, backend, values.dtype)
    if backend == "reference":
        return reference.value_loss(
            values,
            returns,
            mask,
            old_values=old_values,
            clip_range=clip_range,
            aggregation=aggregation,
            normalizer=normalizer,
        )
    values, returns, old_values = alike(values, returns, old_values)
    call = ValueLossCall(
        values=values,
        returns=returns,
        mask=adjacent(boolean(mask)),
        old_values=old_values,
        normalizer=normalizer_tensor(normalizer, values),
        aggregation=AGGREGATIONS[aggregation],
        clip_range=0.0 if clip_range is None else float(clip_range),
    )
    loss, metrics = _ValueLoss.apply(*call, backend)
    clip_fraction, explained_variance = metrics.unbind()
    return loss, {"clip_fraction": clip_fraction, "explained_variance": explained_variance}


def _check_options(clip_range: float | None, aggregation: str) -> None:
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    if clip_range is not None:
        checks.positive("clip_range", clip_range)


class ValueLossCall(NamedTuple):
    """The arguments of the kernel: tensors of one dtype, rows of stride 1, options as numbers."""

    values: Tensor
    returns: Tensor
    mask: Tensor
    old_values: Tensor | None
    normalizer: Tensor | None
    aggregation: int
    clip_range: float


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = ValueLossCall._make(fields)
        loss, metrics, grad_values, scales = dispatch.kernel(KERNEL, backend)(*call)
        ctx.save_for_backward(grad_values, scales)
        ctx.dtype = call.values.dtype
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # the metrics' gradient would be zeros, a tensor
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        grad_values, scales = ctx.saved_tensors
        return gradients(ValueLossCall, values=(grad_values * (scales * grad_loss)).to(ctx.dtype))


@dispatch.fake(KERNEL)
def _(*fields):
    values = ValueLossCall(*fields).values
    shapes = (), (2,), values.shape, (values.shape[0], 1)
    return tuple(values.new_empty(shape, dtype=accumulate_dtype(values)) for shape in shapes)


class ValueLoss(LossModule):
    """`value_loss` as a module. Its arguments are the options of the function."""

    def __init__(
        self,
        clip_range: float | None = None,
        *,
        aggregation: str = "token_mean",
        backend: str | None = None,
    ) -> None:
        _check_options(clip_range, aggregation)
        super().__init__(clip_range=clip_range, aggregation=aggregation, backend=backend)

    def forward(
        self,
        values: Tensor,
        returns: Tensor,
        mask: Tensor,
        *,
        old_values: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the metrics."""
        return value_loss(
            values, returns, mask, old_values=old_values, normalizer=normalizer, **self.options
        )
