"""The losses of policy optimisation from hidden states, without the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autocast import as_autocast
from ..common.autograd import differentiable_once, gradients, save_call, saved_call
from ..common.head import (
    check_head,
    fake_gradients,
    kernel_layout,
    needs_gradient,
    only_needed,
    scaled_gradients,
)
from ..common.token_inputs import boolean, normalizer_tensor
from .options import (
    METRICS,
    PolicyModule,
    PolicyOptions,
    check_options,
    check_tensors,
    kernel_options,
)

KERNEL = "linear_policy_loss_fwd"
dispatch.define(
    "linear_policy_loss_fwd(Tensor? upstream, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor token_ids, Tensor mask, Tensor? temperature_tensor, Tensor? old_logps, "
    "Tensor advantages, Tensor? rollout_weights, Tensor? ref_logps, Tensor? normalizer, "
    "float temperature, float softcap, float logit_scale, int loss_type, int ratio_level, "
    "int kl_estimator, int aggregation, float clip_low, float clip_high, float dual_clip, "
    "float sapo_temperature_pos, float sapo_temperature_neg, float kl_coef, "
    "float entropy_coef, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("linear_policy_loss", KERNEL)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of the token log-probabilities and entropies of hidden @ weight^T + bias.

    The forward pass forms the gradients, a tile of logits at a time, and the backward pass scales
    them. M tokens that count cost 6 M D V flops, 4 M D V with a frozen head, 2 M D V without a
    gradient. The logits are computed twice, for 2 M D V more, in three cases: ratios of sequences,
    16-bit weights with a gradient on the CPU, and the GPU. float16 gradients are formed in the
    backward pass, for another 2 M D V, because without the upstream scale they may round to 0. The
    workspace on the CPU is an eighth of the logits of those tokens, within 7 and 64 MiB. Source
    beside the sources of `policy_loss`: Wijmans 2024, "Cut your losses in large-vocabulary language
    models".

    Args:
        hidden: `(B, T, D)` float32, bfloat16, float16 or float64; any strides; differentiable. A
            masked token may hold anything, in any argument; it has no loss and no gradient.
        weight: `(V, D)`, the output embedding; differentiable. Where the dtypes of `hidden`,
            `weight` and `bias` differ, all are cast to the widest. Under autocast they are cast to
            its dtype, as `F.linear` does; sums are float32 all the same.
        token_ids: `(B, T)` integers in [0, V).
        old_logps: `(B, T)`, log-probabilities in nats at sampling time; None takes the policy's
            own, so that the ratio is 1.
        advantages: `(B,)` or `(B, T)`.
        mask: `(B, T)`, True counts. Where nothing counts the loss is 0, with a graph.
        bias: `(V,)` or None; differentiable. A column of -inf is excluded from the vocabulary.
        temperature: a number above 0, or a tensor `(B, T)` with one per token (no gradient).
        softcap: bound of the tanh soft cap (Gemma 2), applied after `logit_scale`, or None.
        logit_scale: a factor of the logits, above 0.
        loss_type: see `policy_loss`.
        clip_low: see `policy_loss`.
        clip_high: see `policy_loss`.
        dual_clip: see `policy_loss`.
        ratio_level: see `policy_loss`.
        sapo_temperature_pos: see `policy_loss`.
        sapo_temperature_neg: see `policy_loss`.
        ref_logps: `(B, T)`, for the KL term.
        kl_coef: see `policy_loss`.
        kl_estimator: see `policy_loss`.
        entropy_coef: weight of the entropy of the full distribution as a bonus.
        rollout_weights: `(B,)` or `(B, T)`.
        aggregation: see `policy_loss`.
        normalizer: see `policy_loss`.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, metrics)` as `policy_loss`; the metric `entropy` is always measured.

    Raises:
        ValueError, TypeError: a wrong argument, or an option that the loss type does not use. An
            id outside [0, V) in a token that counts is a ValueError on the CPU and gives NaN on a
            GPU.
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
    rows = check_head(hidden, weight, bias, softcap, logit_scale)
    checks.dims("hidden", hidden, 3)
    checks.tensor("token_ids", token_ids, checks.INTEGERS)
    checks.shape("token_ids", token_ids, rows, "one id a row of hidden")
    checks.same_device("token_ids", token_ids, "hidden", hidden)
    checks.temperature("temperature", temperature, hidden, rows)
    check_tensors(
        "token_ids",
        token_ids,
        old_logps=old_logps,
        advantages=advantages,
        mask=mask,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        rollout_weights=rollout_weights,
        normalizer=normalizer,
    )
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    backend = dispatch.choose("linear_policy_loss", hidden.device, backend, hidden.dtype)
    if backend == "reference":
        return reference.linear_policy_loss(
            hidden,
            weight,
            token_ids,
            old_logps,
            advantages,
            mask,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logps=ref_logps,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **options._asdict(),
        )
    hidden, weight, bias = kernel_layout(hidden, weight, bias)
    dtype = accumulate_dtype(hidden)

    def floats(t: Tensor | None) -> Any:
        return None if t is None else t.to(dtype).contiguous()

    temperature_tensor = None
    if isinstance(temperature, Tensor):
        temperature_tensor, temperature = floats(temperature.reshape(-1)), 1.0
    call = LinearPolicyLossCall(
        upstream=None,
        hidden=hidden,
        weight=weight,
        bias=bias,
        token_ids=token_ids.long().reshape(-1).contiguous(),
        mask=boolean(mask).contiguous(),
        temperature_tensor=temperature_tensor,
        old_logps=floats(old_logps),
        advantages=floats(advantages),
        rollout_weights=floats(rollout_weights),
        ref_logps=floats(ref_logps),
        normalizer=normalizer_tensor(normalizer, hidden),
        temperature=float(temperature),
        softcap=0.0 if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        **kernel_options(options),
        need_hidden=needs_gradient(hidden),
        need_weight=needs_gradient(weight),
        need_bias=needs_gradient(bias),
    )
    loss, metrics = _LinearPolicyLoss.apply(*call, backend)
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))


class LinearPolicyLossCall(NamedTuple):
    """The arguments of the kernel: contiguous tensors, rows flat, options as numbers."""

    upstream: Tensor | None
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor
    temperature_tensor: Tensor | None
    old_logps: Tensor | None
    advantages: Tensor
    rollout_weights: Tensor | None
    ref_logps: Tensor | None
    normalizer: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float
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
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    def needed(self) -> tuple[bool, bool, bool]:
        return self.need_hidden, self.need_weight, self.need_bias


class _LinearPolicyLoss(torch.autograd.Function):
    """float16 gradients are formed in the backward pass, by a second call of the kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = LinearPolicyLossCall._make(fields)
        ctx.needed, ctx.backend = call.needed(), backend
        ctx.wait = call.hidden.dtype == torch.float16
        if ctx.wait:
            save_call(ctx, call)
            call = call._replace(need_hidden=False, need_weight=False, need_bias=False)
        loss, metrics, *grads = dispatch.kernel(KERNEL, backend)(*call)
        if not ctx.wait:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # the metrics' gradient would be zeros, a tensor
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        if ctx.wait:
            call = saved_call(ctx)._replace(upstream=grad_loss)
            _, _, *grads = dispatch.kernel(KERNEL, ctx.backend)(*call)
            grads = only_needed(grads, ctx.needed)
        else:
            grads = scaled_gradients(ctx.saved_tensors, ctx.needed, grad_loss)
        grad_hidden, grad_weight, grad_bias = grads
        return gradients(
            LinearPolicyLossCall, hidden=grad_hidden, weight=grad_weight, bias=grad_bias
        )


@dispatch.fake(KERNEL)
def _(*fields):
    call = LinearPolicyLossCall(*fields)
    loss = call.hidden.new_empty((), dtype=accumulate_dtype(call.hidden))
    grads = fake_gradients(call.hidden, call.weight, call.needed())
    return loss, loss.new_empty(len(METRICS)), *grads


class LinearPolicyLoss(PolicyModule):
    """`linear_policy_loss` as a module. Its arguments are the options of `policy_loss`."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ref_logps: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the metrics."""
        return linear_policy_loss(
            hidden,
            weight,
            token_ids,
            old_logps,
            advantages,
            mask,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logps=ref_logps,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **self.options,
        )
