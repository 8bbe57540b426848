"""Sums of the log-probabilities of sequences, for the operations that are made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...reference.numerics import accumulate_dtype
from .autograd import differentiable_once, gradients

FORWARD, BACKWARD = "sequence_logps_fwd", "sequence_logps_bwd"
dispatch.define("sequence_logps_fwd(Tensor logps, Tensor mask, bool average) -> (Tensor, Tensor)")
dispatch.define("sequence_logps_bwd(Tensor grad, Tensor mask) -> Tensor")


class SequenceLogpsCall(NamedTuple):
    """The arguments of the forward kernel: `(B, T)`, a boolean and contiguous mask."""

    logps: Tensor
    mask: Tensor
    average: bool


class SequenceLogpsBackwardCall(NamedTuple):
    """The arguments of the backward kernel; grad is `(B,)`, of the sums."""

    grad: Tensor
    mask: Tensor


def summed_logps(logps: Tensor, mask: Tensor, average: bool, backend: str) -> Tensor:
    """The sum or the mean of each row of checked log-probabilities where `mask` counts, `(B,)`."""
    mask = mask if mask.dtype == torch.bool else mask != 0
    call = SequenceLogpsCall(logps, mask.contiguous(), average=average)
    return _SequenceLogps.apply(*call, backend)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = SequenceLogpsCall._make(fields)
        sums, tokens = dispatch.kernel(FORWARD, backend)(*call)
        ctx.save_for_backward(call.mask, tokens)
        ctx.average, ctx.dtype, ctx.backend = call.average, call.logps.dtype, backend
        return sums

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        mask, tokens = ctx.saved_tensors
        grad = grad / tokens if ctx.average else grad.contiguous()
        call = SequenceLogpsBackwardCall(grad, mask)
        grad_logps = dispatch.kernel(BACKWARD, ctx.backend)(*call)
        return gradients(SequenceLogpsCall, logps=grad_logps.to(ctx.dtype))


@dispatch.fake(FORWARD)
def _(*fields):
    call = SequenceLogpsCall(*fields)
    rows = call.logps.shape[0]
    sums = call.logps.new_empty(rows, dtype=accumulate_dtype(call.logps))
    return sums, sums.new_empty(rows if call.average else 0)


@dispatch.fake(BACKWARD)
def _(*fields):
    call = SequenceLogpsBackwardCall(*fields)
    return call.grad.new_empty(call.mask.shape)
