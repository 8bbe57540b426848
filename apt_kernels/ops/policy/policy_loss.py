"""The losses of policy optimisation: PPO, GRPO and their family."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients
from ..common.head import needs_gradient
from ..common.token_inputs import adjacent, alike, boolean, normalizer_tensor
from .options import (
    METRICS,
    PolicyModule,
    PolicyOptions,
    check_options,
    check_tensors,
    kernel_options,
)

KERNEL = "policy_loss_fwd"
dispatch.define(
    "policy_loss_fwd(Tensor logps, Tensor? old_logps, Tensor advantages, Tensor mask, "
    "Tensor? rollout_weights, Tensor? ref_logps, Tensor? entropy, Tensor? normalizer, "
    "int loss_type, int ratio_level, int kl_estimator, int aggregation, float clip_low, "
    "float clip_high, float dual_clip, float sapo_temperature_pos, float sapo_temperature_neg, "
    "float kl_coef, float entropy_coef, bool need_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("policy_loss", KERNEL)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    sapo_temperature_pos: float | None = None,
    sapo_temperature_neg: float | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss w * surrogate(ratio, A) + kl_coef * KL - entropy_coef * entropy, and metrics.

    The losses of tokens are aggregated to one number. One pass forms the loss, all metrics and the
    gradients; the backward pass scales the gradients. The tables of
    `apt_kernels.reference.policy_loss` have the surrogates and aggregations with their sources.

    Args:
        logps: `(B, T)` log-probabilities in nats; float32, bfloat16, float16 or float64; any
            strides; differentiable. A masked token may hold anything, in any argument; it has no
            loss, and its gradient is exactly 0.
        old_logps: `(B, T)`, log-probabilities at sampling time; None takes `logps` itself, so that
            the ratio is 1.
        advantages: `(B,)` or `(B, T)`, A.
        mask: `(B, T)`, True counts. Where nothing counts the loss is 0, with a graph.
        loss_type: "clip" (PPO), "cispo", "sapo" or "reinforce".
        clip_low: how far below 1 the ratio may fall, in [0, 1]; for clip and cispo.
        clip_high: how far above 1 it may rise, at least 0; for clip and cispo.
        dual_clip: for clip, the largest ratio where A < 0; above 1.
        ratio_level: "token", or "sequence" for GSPO (not for reinforce).
        sapo_temperature_pos: for sapo where A > 0; None means 1.0.
        sapo_temperature_neg: for sapo elsewhere; None means 1.05.
        ref_logps: `(B, T)`, for the KL term; the metric ref_kl is measured for any `kl_coef`.
        kl_coef: weight of the KL term. 0 leaves the term out; else `ref_logps` is needed.
        kl_estimator: "k1", "k2" or "k3", see `kl_penalty`; or "unbiased_k3", k3 times the ratio of
            the token (TRL's default for GRPO). The gradient flows through both factors.
        entropy: `(B, T)`; differentiable.
        entropy_coef: weight of the entropy bonus. 0 leaves the bonus out; else `entropy` is needed.
        rollout_weights: `(B,)` or `(B, T)`, w, which corrects for the policy that sampled.
        aggregation: "token_mean", "token_sum", "sequence_mean", "sequence_sum" or "dr_grpo".
        normalizer: replaces the denominator of the aggregation; a number or 0-dim tensor, above 0.
            The value of a tensor is checked on the CPU only.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, metrics)`, 0-dim float32 (float64 for float64 logps). The metrics have no graph and
        cost no synchronisation: policy_loss, approx_kl, ppo_kl, clip_fraction, dual_clip_fraction,
        ref_kl, entropy.

    Raises:
        ValueError, TypeError: a wrong argument, or an option that the loss type does not use.
    """
    options = PolicyOptions(
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        aggregation=aggregation,
    )
    check_options(options)
    checks.tensor("logps", logps)
    checks.dims("logps", logps, 2)
    check_tensors(
        "logps",
        logps,
        old_logps=old_logps,
        advantages=advantages,
        mask=mask,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        rollout_weights=rollout_weights,
        normalizer=normalizer,
    )
    if entropy is not None:
        checks.pair("entropy", entropy, "logps", logps)
    elif entropy_coef:
        raise ValueError("entropy: expected a tensor, as entropy_coef is not 0, got None")
    backend = dispatch.choose("policy_loss", logps.device, backend, logps.dtype)
    if backend == "reference":
        return reference.policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            ref_logps=ref_logps,
            entropy=entropy,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **options._asdict(),
        )
    logps, old_logps, advantages, rollout_weights, ref_logps, entropy = alike(
        logps, old_logps, advantages, rollout_weights, ref_logps, entropy
    )
    call = PolicyLossCall(
        logps=logps,
        old_logps=old_logps,
        advantages=advantages,
        mask=adjacent(boolean(mask)),
        rollout_weights=rollout_weights,
        ref_logps=ref_logps,
        entropy=entropy,
        normalizer=normalizer_tensor(normalizer, logps),
        **kernel_options(options),
        need_entropy=entropy_coef != 0 and needs_gradient(entropy),
    )
    loss, metrics = _PolicyLoss.apply(*call, backend)
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))


class PolicyLossCall(NamedTuple):
    """The arguments of the kernel: tensors of one dtype, rows of stride 1, options as numbers."""

    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor
    rollout_weights: Tensor | None
    ref_logps: Tensor | None
    entropy: Tensor | None
    normalizer: Tensor | None
    loss_type: int
    ratio_level: int
    kl_estimator: int
    aggregation: int
    clip_low: float
    clip_high: float
    dual_clip: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    kl_coef: float
    entropy_coef: float
    need_entropy: bool


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = PolicyLossCall._make(fields)
        loss, metrics, grad_logps, grad_entropy, scales = dispatch.kernel(KERNEL, backend)(*call)
        ctx.save_for_backward(grad_logps, grad_entropy, scales)
        ctx.dtype, ctx.need_entropy = call.logps.dtype, call.need_entropy
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # the metrics' gradient would be zeros, a tensor
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        grad_logps, grad_entropy, scales = ctx.saved_tensors
        factors = scales * grad_loss  # of the rows
        grads = {}
        if ctx.needs_input_grad[PolicyLossCall._fields.index("logps")]:
            grads["logps"] = grad_logps * factors
        if ctx.need_entropy:
            grads["entropy"] = grad_entropy * factors
        if factors.dtype != ctx.dtype:
            grads = {name: grad.to(ctx.dtype) for name, grad in grads.items()}
        return gradients(PolicyLossCall, **grads)


@dispatch.fake(KERNEL)
def _(*fields):
    call = PolicyLossCall(*fields)
    logps = call.logps
    of_entropy = logps.shape if call.need_entropy else (0,)
    shapes = (), (len(METRICS),), logps.shape, of_entropy, (logps.shape[0], 1)
    return tuple(logps.new_empty(shape, dtype=accumulate_dtype(logps)) for shape in shapes)


class PolicyLoss(PolicyModule):
    """`policy_loss` as a module. Its arguments are the options of the function."""

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logps: Tensor | None = None,
        entropy: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the metrics."""
        return policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            ref_logps=ref_logps,
            entropy=entropy,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **self.options,
        )
