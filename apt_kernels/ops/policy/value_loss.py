"""The loss of value functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from ..common.token_inputs import AGGREGATIONS, adjacent, alike, boolean, normalizer_tensor

dispatch.define(
    "value_loss_fwd(Tensor values, Tensor returns, Tensor mask, Tensor? old_values, "
    "Tensor? normalizer, int aggregation, "
    "float clip_range) -> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("value_loss", "value_loss_fwd")


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
    """The aggregate of (v - R)^2 / 2, or of max((v - R)^2, (v' - R)^2) / 2 with clipping; metrics.

    v' = clamp(v, old_values - clip_range, old_values + clip_range). One pass forms the loss, the
    metrics and the gradient; backward scales it. Source: Schulman 2017, Dhariwal 2017.

    Args:
        values: `(B, T)` float32, bfloat16, float16 or float64; any strides; differentiable. A
            masked token of any argument may hold anything; it has exactly no gradient.
        returns: `(B, T)`.
        mask: `(B, T)`, True counts. Nothing counts: a loss of 0 with a graph.
        old_values: `(B, T)`, the values at sampling time; with `clip_range` alone.
        clip_range: how far the value may move, above 0; None: no clipping.
        aggregation: as in `policy_loss`.
        normalizer: as in `policy_loss`.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, metrics)`, 0-dim float32 (float64 for float64 values). The metrics, without a
        graph: clip_fraction, and explained_variance = 1 - Var(R - v) / Var(R) over the tokens
        that count, 0 where their returns are all equal.

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
            values, returns, mask, old_values=old_values, clip_range=clip_range,
            aggregation=aggregation, normalizer=normalizer,
        )  # fmt: skip
    values, returns, old_values = alike(values, returns, old_values)
    loss, metrics = _ValueLoss.apply(
        values,
        returns,
        adjacent(boolean(mask)),
        old_values,
        normalizer_tensor(normalizer, values),
        AGGREGATIONS[aggregation],
        0.0 if clip_range is None else float(clip_range),
        backend,
    )
    clip_fraction, explained_variance = metrics.unbind()
    return loss, {"clip_fraction": clip_fraction, "explained_variance": explained_variance}


def _check_options(clip_range: float | None, aggregation: str) -> None:
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    if clip_range is not None:
        checks.positive("clip_range", clip_range)


class ValueLoss(nn.Module):
    """`value_loss` as a module; its arguments are the options of the function."""

    def __init__(
        self,
        clip_range: float | None = None,
        *,
        aggregation: str = "token_mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_options(clip_range, aggregation)
        self.options = {
            "clip_range": clip_range, "aggregation": aggregation, "backend": backend
        }  # fmt: skip

    def forward(
        self,
        values: Tensor,
        returns: Tensor,
        mask: Tensor,
        *,
        old_values: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics)."""
        return value_loss(
            values, returns, mask, old_values=old_values, normalizer=normalizer, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, values, returns, mask, old_values, normalizer, aggregation, clip_range, backend
    ):
        loss, metrics, grad_values, scales = dispatch.kernel("value_loss_fwd", backend)(
            values, returns, mask, old_values, normalizer, aggregation, clip_range
        )
        ctx.save_for_backward(grad_values, scales)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        grad_values, scales = ctx.saved_tensors
        return (grad_values * (scales * grad_loss)).to(ctx.dtype), *[None] * 7


@dispatch.fake("value_loss_fwd")
def _(values, *arguments):
    dtype = accumulate_dtype(values)
    shapes = (), (2,), values.shape, (values.shape[0], 1)
    return tuple(values.new_empty(shape, dtype=dtype) for shape in shapes)
