"""Shared by the operations over an output head: checks, layout, and the log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch
from ...reference.numerics import accumulate_dtype
from .autograd import differentiable_once, gradients

FORWARD, BACKWARD = "linear_token_logprobs_fwd", "linear_token_logprobs_bwd"
dispatch.define(
    "linear_token_logprobs_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor? mask, Tensor? temperature_tensor, float temperature, float softcap, "
    "float logit_scale, bool return_entropy, "
    "bool form_grad_hidden) -> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "linear_token_logprobs_bwd(Tensor grad_logps, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? temperature_tensor, "
    "Tensor lse, Tensor entropy, float temperature, float softcap, float logit_scale, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


class LinearTokenLogprobsCall(NamedTuple):
    """The arguments of the forward kernel: rows `(N, D)` of one dtype, numbers for options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float
    return_entropy: bool
    form_grad_hidden: bool


class LinearTokenLogprobsBackwardCall(NamedTuple):
    """The arguments of the backward kernel."""

    grad_logps: Tensor
    grad_entropy: Tensor | None
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None
    lse: Tensor
    entropy: Tensor
    temperature: float
    softcap: float
    logit_scale: float
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> torch.Size:
    """Checks the arguments of an output head, and returns the shape of its rows."""
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


def check_tokens(hidden: Tensor, token_ids: Tensor, temperature: Any, mask: Tensor | None) -> None:
    """Checks the arguments that have one entry a row of hidden states."""
    rows = hidden.shape[:-1]
    checks.tensor("token_ids", token_ids, checks.INTEGERS)
    checks.shape("token_ids", token_ids, rows, "one id a row of hidden")
    checks.same_device("token_ids", token_ids, "hidden", hidden)
    checks.temperature("temperature", temperature, hidden, rows)
    checks.row_mask("mask", mask, hidden, rows)


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
    """The gradients of hidden states, weight and bias that forward formed, times the upstream one.

    On the CPU the upstream value can be read at no cost, and a 1 spares a copy as large as the
    weight. The gradient of the hidden states is copied all the same: reshaped it may become the
    `.grad` of a leaf, into which the next backward pass of a retained graph adds.
    """
    one = not torch.compiler.is_compiling() and grad_loss.device.type == "cpu"
    try:
        one = one and bool(grad_loss == 1)
    except RuntimeError:  # a batch of upstream gradients (vmap) has no one value
        one = False
    scaled = (g if one and i > 0 else g * grad_loss for i, g in enumerate(grads))
    return only_needed(scaled, needed)


def only_needed(grads: Iterable[Tensor], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that are needed; kernels give empty tensors for the others."""
    return [g if n else None for g, n in zip(grads, needed, strict=True)]


def needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    mask: Tensor | None,
    temperature: float | Tensor = 1.0,
    softcap: float | None,
    logit_scale: float,
    return_entropy: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (or nothing) of rows `(...)` of a checked head."""
    rows = hidden.shape[:-1]
    flat, weight, bias = kernel_layout(hidden, weight, bias)
    frozen_head = not (needs_gradient(weight) or needs_gradient(bias))
    temperature_tensor = None
    if isinstance(temperature, Tensor):
        temperature_tensor = temperature.to(accumulate_dtype(flat)).reshape(-1).contiguous()
        temperature = 1.0
    call = LinearTokenLogprobsCall(
        hidden=flat,
        weight=weight,
        bias=bias,
        token_ids=token_ids.long().reshape(-1).contiguous(),
        mask=None if mask is None else (mask != 0).reshape(-1).contiguous(),
        temperature_tensor=temperature_tensor,
        temperature=float(temperature),
        softcap=0.0 if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        return_entropy=return_entropy,
        form_grad_hidden=needs_gradient(flat) and frozen_head and not return_entropy,
    )
    logps, entropy = _LinearTokenLogprobs.apply(*call, backend)
    return logps.reshape(rows), entropy.reshape(rows) if return_entropy else entropy


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = LinearTokenLogprobsCall._make(fields)
        logps, entropy, lse, grad_hidden = dispatch.kernel(FORWARD, backend)(*call)
        ctx.formed, ctx.backend = call.form_grad_hidden, backend
        if call.form_grad_hidden:
            ctx.save_for_backward(call.mask, grad_hidden)
        else:
            ctx.save_for_backward(
                call.hidden,
                call.weight,
                call.bias,
                call.token_ids,
                call.mask,
                call.temperature_tensor,
                lse,
                entropy,
            )
            ctx.temperature, ctx.softcap = call.temperature, call.softcap
            ctx.logit_scale, ctx.return_entropy = call.logit_scale, call.return_entropy
        ctx.set_materialize_grads(False)
        if not call.return_entropy:
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
            return gradients(LinearTokenLogprobsCall, hidden=grad_hidden)
        (hidden, weight, bias, token_ids, mask, temperature_tensor, lse, entropy) = (
            ctx.saved_tensors
        )
        if grad_logps is None:
            grad_logps = torch.zeros(token_ids.shape, dtype=entropy.dtype, device=entropy.device)
        if not ctx.return_entropy:
            grad_entropy = None
        needed = need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        call = LinearTokenLogprobsBackwardCall(
            grad_logps=grad_logps.contiguous(),
            grad_entropy=None if grad_entropy is None else grad_entropy.contiguous(),
            hidden=hidden,
            weight=weight,
            bias=bias,
            token_ids=token_ids,
            mask=mask,
            temperature_tensor=temperature_tensor,
            lse=lse,
            entropy=entropy,
            temperature=ctx.temperature,
            softcap=ctx.softcap,
            logit_scale=ctx.logit_scale,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
        grads = dispatch.kernel(BACKWARD, ctx.backend)(*call)
        grad_hidden, grad_weight, grad_bias = only_needed(grads, needed)
        return gradients(
            LinearTokenLogprobsCall, hidden=grad_hidden, weight=grad_weight, bias=grad_bias
        )


@dispatch.fake(FORWARD, "native")
def _fake_forward(*fields):
    call = LinearTokenLogprobsCall(*fields)
    rows, _ = call.hidden.shape
    logps = call.hidden.new_empty(rows, dtype=accumulate_dtype(call.hidden))
    entropy = logps.new_empty(rows if call.return_entropy else 0)
    lse = logps.new_empty(rows, dtype=torch.float64)
    formed = call.hidden.shape if call.form_grad_hidden else (0,)
    return logps, entropy, lse, call.hidden.new_empty(formed)


@dispatch.fake(FORWARD, "triton")
def _(*fields):
    logps, entropy, lse, grad_hidden = _fake_forward(*fields)
    return logps, entropy, logps.new_empty((*lse.shape, 2)), grad_hidden


def fake_gradients(hidden: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]):
    """Gradients of hidden states, weight and bias as kernels give them: `(0,)` if not needed."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(tuple(s) if n else (0,)) for s, n in zip(shapes, needed, strict=True)
    )


@dispatch.fake(BACKWARD)
def _(*fields):
    call = LinearTokenLogprobsBackwardCall(*fields)
    needed = (call.need_hidden, call.need_weight, call.need_bias)
    return fake_gradients(call.hidden, call.weight, needed)
