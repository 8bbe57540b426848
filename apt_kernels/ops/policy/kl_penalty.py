"""Estimates of the KL divergence from a reference policy, token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import KL_ESTIMATORS
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients, save_call, saved_call
from ..common.token_inputs import alike, boolean

FORWARD, BACKWARD = "kl_penalty_fwd", "kl_penalty_bwd"
dispatch.define(
    "kl_penalty_fwd(Tensor logps, Tensor ref_logps, Tensor? mask, int estimator) -> Tensor"
)
dispatch.define(
    "kl_penalty_bwd(Tensor grad, Tensor logps, Tensor ref_logps, Tensor? mask, "
    "int estimator) -> Tensor"
)
dispatch.register("kl_penalty", FORWARD, BACKWARD)

_ESTIMATORS = ("k1", "k2", "k3")  # unbiased_k3 needs a ratio


def kl_penalty(
    logps: Tensor,
    ref_logps: Tensor,
    estimator: str = "k3",
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """An estimate of KL(policy || reference) at each token, from d = logps - ref_logps.

    "k1" is d. "k2" is d^2 / 2. "k3" is exp(x) - 1 - x with x = clamp(-d, -20, 20), and has no
    gradient where the clamp holds x. Both tensors are read once. Source: Schulman 2020,
    "Approximating KL divergence".

    Args:
        logps: any shape, in nats; float32, bfloat16, float16 or float64; any strides;
            differentiable.
        ref_logps: the same shape; no gradient.
        estimator: "k1", "k2" or "k3".
        mask: the same shape, True counts. Elsewhere the value and the gradient are exactly 0,
            whatever the log-probabilities are there.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The shape of logps, float32 (float64 for float64 logps).

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("logps", logps)
    checks.pair("ref_logps", ref_logps, "logps", logps, constant_=True)
    checks.choice("estimator", estimator, _ESTIMATORS)
    if mask is not None:
        checks.token_mask("mask", mask, "logps", logps)
    backend = dispatch.choose("kl_penalty", logps.device, backend, logps.dtype)
    if backend == "reference":
        return reference.kl_penalty(logps, ref_logps, estimator, mask=mask)
    logps, ref_logps = alike(logps, ref_logps)
    call = KLPenaltyCall(
        logps=logps.contiguous(),
        ref_logps=ref_logps.contiguous(),
        mask=None if mask is None else boolean(mask).contiguous(),
        estimator=KL_ESTIMATORS[estimator],
    )
    return _KLPenalty.apply(*call, backend)


class KLPenaltyCall(NamedTuple):
    """The arguments of the forward kernel, contiguous; the estimator as a number."""

    logps: Tensor
    ref_logps: Tensor
    mask: Tensor | None
    estimator: int


class KLPenaltyBackwardCall(NamedTuple):
    """The arguments of the backward kernel: the upstream gradient, then the forward's fields."""

    grad: Tensor
    logps: Tensor
    ref_logps: Tensor
    mask: Tensor | None
    estimator: int


class _KLPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = KLPenaltyCall._make(fields)
        save_call(ctx, call)
        ctx.backend = backend
        return dispatch.kernel(FORWARD, backend)(*call)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        call = saved_call(ctx)
        backward = KLPenaltyBackwardCall(grad.contiguous(), *call)
        grad_logps = dispatch.kernel(BACKWARD, ctx.backend)(*backward)
        return gradients(KLPenaltyCall, logps=grad_logps.to(call.logps.dtype))


@dispatch.fake(FORWARD)
def _(*fields):
    logps = KLPenaltyCall(*fields).logps
    return logps.new_empty(logps.shape, dtype=accumulate_dtype(logps))


@dispatch.fake(BACKWARD)
def _(*fields):
    call = KLPenaltyBackwardCall(*fields)
    return call.grad.new_empty(call.logps.shape)
