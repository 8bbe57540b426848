"""What the operations over an output head share: checks, layout, and the log-probabilities."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import checks, dispatch
from ...reference.numerics import accumulate_dtype
from .autograd import differentiable_once

FORWARD, BACKWARD = "linear_token_logprobs_fwd", "linear_token_logprobs_bwd"
dispatch.define(
    "linear_token_logprobs_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor? mask, Tensor? temperatures, float temperature, float softcap, "
    "float logit_scale, bool return_entropy, "
    "bool form_grad_hidden) -> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "linear_token_logprobs_bwd(Tensor grad_logps, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? temperatures, "
    "Tensor lse, Tensor entropy, float temperature, float softcap, float logit_scale, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> torch.Size:
    """Rejects arguments that are no output head; returns the shape of the rows."""
    checks.tensor("hidden", hidden)
    checks.tensor("weight", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (..., D), D >= 1, got {tuple(hidden.shape)}")
    checks.dims("weight", weight, 2)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}), V >= 1 and the last dimension of "
            f"hidden, got {tuple(weight.shape)}; a weight that is sharded must be gathered first"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.shape("bias", bias, weight.shape[:1], "one number a row of weight")
        checks.same_device("bias", bias, "hidden", hidden)
    if softcap is not None:
        checks.positive("softcap", softcap)
    checks.positive("logit_scale", logit_scale)
    return hidden.shape[:-1]


def kernel_layout(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of hidden states, weight and bias, contiguous and of one dtype (the widest)."""
    present = [t.dtype for t in (hidden, weight, bias) if t is not None]
    dtype = functools.reduce(torch.promote_types, present)
    rows = hidden.to(dtype).reshape(-1, hidden.shape[-1]).contiguous()
    return (
        rows,
        weight.to(dtype).contiguous(),
        None if bias is None else bias.to(dtype).contiguous(),
    )


def scaled_gradients(
    grads: tuple[Tensor, ...], needed: tuple[bool, ...], grad_loss: Tensor
) -> list[Tensor | None]:
    """Those of the forward pass, of hidden states, weight and bias, times the upstream gradient.

    On the CPU a look at its value is free, and a 1 spares a copy as large as the weight. The hidden
    states' gradient is copied all the same: reshaped it may become a leaf's `.grad`, into which the
    next backward pass of a retained graph adds.
    """
    one = not torch.compiler.is_compiling() and grad_loss.device.type == "cpu"
    try:
        one = one and bool(grad_loss == 1)
    except RuntimeError:  # a batch of upstream gradients (vmap) has no one value
        one = False
    scaled = (g if one and i > 0 else g * grad_loss for i, g in enumerate(grads))
    return [g if n else None for g, n in zip(scaled, needed, strict=True)]


def needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (or nothing) of rows `(...)` of a checked head."""
    rows = hidden.shape[:-1]
    flat, weight, bias = kernel_layout(hidden, weight, bias)
    frozen_head = not (needs_gradient(weight) or needs_gradient(bias))
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures = temperature.to(accumulate_dtype(flat)).reshape(-1).contiguous()
    logps, entropy = _LinearTokenLogprobs.apply(
        flat,
        weight,
        bias,
        token_ids.long().reshape(-1).contiguous(),
        None if mask is None else (mask != 0).reshape(-1).contiguous(),
        temperatures,
        1.0 if temperatures is not None else float(temperature),
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        return_entropy,
        needs_gradient(flat) and frozen_head and not return_entropy,
        backend,
    )
    return logps.reshape(rows), entropy.reshape(rows) if return_entropy else entropy


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        token_ids,
        mask,
        temperatures,
        temperature,
        softcap,
        logit_scale,
        return_entropy,
        form_grad_hidden,
        backend,
    ):
        head, rows = (hidden, weight, bias), (token_ids, mask, temperatures)
        options = (temperature, softcap, logit_scale)
        logps, entropy, lse, grad_hidden = dispatch.kernel(FORWARD, backend)(
            *head, *rows, *options, return_entropy, form_grad_hidden
        )
        if form_grad_hidden:
            ctx.save_for_backward(mask, grad_hidden)
        else:
            ctx.save_for_backward(*head, *rows, lse, entropy)
        ctx.formed, ctx.options, ctx.backend = form_grad_hidden, options, backend
        ctx.return_entropy = return_entropy
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps, grad_entropy):
        if ctx.formed:
            mask, grad_hidden = ctx.saved_tensors
            grad_hidden = (grad_hidden * grad_logps.unsqueeze(-1)).to(grad_hidden.dtype)
            if mask is not None:
                grad_hidden = grad_hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
            return grad_hidden, *(None,) * 11
        *inputs, lse, entropy = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros(inputs[3].shape, dtype=entropy.dtype, device=entropy.device)
        needed = ctx.needs_input_grad[:3]
        grads = dispatch.kernel(BACKWARD, ctx.backend)(
            grad_logps.contiguous(),
            grad_entropy.contiguous() if ctx.return_entropy and grad_entropy is not None else None,
            *inputs,
            lse,
            entropy,
            *ctx.options,
            *needed,
        )
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 9


@dispatch.fake(FORWARD, "native")
def _fake_forward(hidden, weight, bias, token_ids, mask, temperatures, *options):
    return_entropy, form_grad_hidden = options[-2:]
    rows = hidden.shape[0]
    logps = hidden.new_empty(rows, dtype=accumulate_dtype(hidden))
    entropy = logps.new_empty(rows if return_entropy else 0)
    lse = logps.new_empty(rows, dtype=torch.float64)
    return logps, entropy, lse, hidden.new_empty(hidden.shape if form_grad_hidden else (0,))


@dispatch.fake(FORWARD, "triton")
def _(*arguments):
    logps, entropy, lse, grad_hidden = _fake_forward(*arguments)
    return logps, entropy, logps.new_empty((*lse.shape, 2)), grad_hidden


def fake_gradients(hidden: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(tuple(s) if n else (0,)) for s, n in zip(shapes, needed, strict=True)
    )


@dispatch.fake(BACKWARD)
def _(grad, grad_entropy, hidden, weight, bias, *rest):
    return fake_gradients(hidden, weight, rest[-3:])
