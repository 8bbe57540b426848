"""Sums of the log-probabilities of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once

dispatch.define("sequence_logps_fwd(Tensor logps, Tensor mask, bool average) -> (Tensor, Tensor)")
dispatch.define("sequence_logps_bwd(Tensor grad, Tensor mask) -> Tensor")
dispatch.register("sequence_logps", "sequence_logps_fwd", "sequence_logps_bwd")


def sequence_logps(
    logps: Tensor, mask: Tensor, *, average: bool = False, backend: str | None = None
) -> Tensor:
    """The sum (or the mean) of each row's log-probabilities where `mask` counts.

    Reads both once; backward reads the mask and writes the gradient.

    Args:
        logps: `(B, T)` float32, bfloat16, float16 or float64; any strides; differentiable. What
            masked slots hold does not matter, their gradient is exactly 0.
        mask: `(B, T)`, True counts.
        average: divide by the number of tokens that count.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(B,)` in nats, float32 (float64 for float64 logps); 0 for a row of no tokens.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("logps", logps)
    checks.dims("logps", logps, 2)
    checks.token_mask("mask", mask, "logps", logps)
    checks.flag("average", average)
    backend = dispatch.choose("sequence_logps", logps.device, backend, logps.dtype)
    if backend == "reference":
        return reference.sequence_logps(logps, mask, average=average)
    mask = mask if mask.dtype == torch.bool else mask != 0
    return _SequenceLogps.apply(logps, mask.contiguous(), average, backend)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, mask, average, backend):
        sums, tokens = dispatch.kernel("sequence_logps_fwd", backend)(logps, mask, average)
        ctx.save_for_backward(mask, tokens)
        ctx.options = (average, backend, logps.dtype)
        return sums

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        mask, tokens = ctx.saved_tensors
        average, backend, dtype = ctx.options
        grad = grad / tokens if average else grad.contiguous()
        grad_logps = dispatch.kernel("sequence_logps_bwd", backend)(grad, mask)
        return grad_logps.to(dtype), None, None, None


@dispatch.fake("sequence_logps_fwd")
def _(logps, mask, average):
    sums = logps.new_empty(logps.shape[0], dtype=accumulate_dtype(logps))
    return sums, sums.new_empty(logps.shape[0] if average else 0)


@dispatch.fake("sequence_logps_bwd")
def _(grad, mask):
    return grad.new_empty(mask.shape)
