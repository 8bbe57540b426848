"""Estimates of the KL divergence from a reference policy, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from ..common.token_inputs import alike, boolean

dispatch.define(
    "kl_penalty_fwd(Tensor logps, Tensor ref_logps, Tensor? mask, int estimator) -> Tensor"
)
dispatch.define(
    "kl_penalty_bwd(Tensor grad, Tensor logps, Tensor ref_logps, Tensor? mask, "
    "int estimator) -> Tensor"
)
dispatch.register("kl_penalty", "kl_penalty_fwd", "kl_penalty_bwd")

_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


def kl_penalty(
    logps: Tensor,
    ref_logps: Tensor,
    estimator: str = "k3",
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """An estimate of KL(policy || reference) at each token, from d = logps - ref_logps.

    "k1": d; "k2": d^2 / 2; "k3": exp(x) - 1 - x with x = clamp(-d, -20, 20), without gradient
    beyond. Reads both once. Source: Schulman 2020, "Approximating KL divergence".

    Args:
        logps: any shape, in nats; float32, bfloat16, float16 or float64; any strides;
            differentiable.
        ref_logps: the same shape; no gradient.
        estimator: "k1", "k2" or "k3".
        mask: the same shape, True counts; elsewhere value and gradient are exactly 0, whatever
            the log-probabilities are there.
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
    mask = mask if mask is None else boolean(mask).contiguous()
    return _KlPenalty.apply(
        logps.contiguous(), ref_logps.contiguous(), mask, _ESTIMATORS[estimator], backend
    )


class _KlPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, ref_logps, mask, estimator, backend):
        ctx.save_for_backward(logps, ref_logps, mask)
        ctx.options = (estimator, backend)
        return dispatch.kernel("kl_penalty_fwd", backend)(logps, ref_logps, mask, estimator)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        logps, ref_logps, mask = ctx.saved_tensors
        estimator, backend = ctx.options
        grad_logps = dispatch.kernel("kl_penalty_bwd", backend)(
            grad.contiguous(), logps, ref_logps, mask, estimator
        )
        return grad_logps.to(logps.dtype), None, None, None, None


@dispatch.fake("kl_penalty_fwd")
def _(logps, ref_logps, mask, estimator):
    dtype = accumulate_dtype(logps)
    return logps.new_empty(logps.shape, dtype=dtype)


@dispatch.fake("kl_penalty_bwd")
def _(grad, logps, ref_logps, mask, estimator):
    return grad.new_empty(logps.shape)
