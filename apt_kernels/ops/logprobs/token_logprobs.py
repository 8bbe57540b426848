"""Log-softmax gathered at token ids, without the log-softmax."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients

FORWARD, BACKWARD = "token_logprobs_fwd", "token_logprobs_bwd"
dispatch.define(
    "token_logprobs_fwd(Tensor logits, Tensor token_ids, Tensor? mask, "
    "Tensor? temperature_tensor, float temperature, float softcap, "
    "bool return_entropy) -> (Tensor, Tensor, Tensor)"
)
dispatch.define(
    "token_logprobs_bwd(Tensor grad_logps, Tensor? grad_entropy, Tensor logits, "
    "Tensor token_ids, Tensor? mask, Tensor? temperature_tensor, Tensor lse, Tensor entropy, "
    "float temperature, float softcap) -> Tensor"
)
dispatch.register("token_logprobs", FORWARD, BACKWARD)


class TokenLogprobsCall(NamedTuple):
    """The arguments of the forward kernel: logits `(A, B, V)`, ids `(A, B, K)`, rows `(A, B)`."""

    logits: Tensor
    token_ids: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    softcap: float
    return_entropy: bool


class TokenLogprobsBackwardCall(NamedTuple):
    """The arguments of the backward kernel."""

    grad_logps: Tensor
    grad_entropy: Tensor | None
    logits: Tensor
    token_ids: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None
    lse: Tensor
    entropy: Tensor
    temperature: float
    softcap: float


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    softcap: float | None = ...,
    return_entropy: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """z[token_id] - logsumexp(z), where z = softcap * tanh(logits / softcap) / temperature.

    Forward reads the logits once; backward reads them once more and writes their gradient once.
    Between the two only the ids and one or two numbers a row are kept. The entropy of the full
    distribution comes from the same pass. Source: Milakov & Gimelshein 2018, "Online normalizer
    calculation for softmax".

    Slicing the logits of a model (`logits[:, :-1]`) costs no copy forward, but PyTorch copies their
    gradient back; passing all logits, the ids shifted left and a mask that is False at the last
    position gives the same gradient without the copy.

    Args:
        logits: `(..., V)` float32, bfloat16, float16 or float64; any strides; differentiable.
            A column of -inf is excluded from the vocabulary.
        token_ids: `(...)` integers in [0, V), or `(..., K)` for K tokens a row.
        temperature: a number above 0, or a tensor `(...)` of one per row (no gradient).
        mask: `(...)`, True counts. Other rows may hold anything, and so may their ids: they are
            not read, their results are 0 and their gradients exactly 0.
        softcap: bound of the tanh soft cap (Gemma 2), or None.
        return_entropy: also return the entropy of softmax(z), `(...)`, in nats, differentiable.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The log-probabilities in nats, shaped as `token_ids`, float32 (float64 for float64 logits);
        or the pair `(logps, entropy)`. No rows: an empty tensor.

    Raises:
        ValueError, TypeError: a wrong argument. An id outside [0, V) or a temperature not above 0,
            in a row that counts, is a ValueError on the CPU; on a GPU the log-probability of such
            an id is NaN, and a tensor of temperatures is not looked at.
    """
    _check(logits, token_ids, temperature, mask, softcap, return_entropy)
    backend = dispatch.choose("token_logprobs", logits.device, backend, logits.dtype)
    if backend == "reference":
        return reference.token_logprobs(
            logits,
            token_ids,
            temperature=temperature,
            mask=mask,
            softcap=softcap,
            return_entropy=return_entropy,
        )
    rows = logits.shape[:-1]
    outer = (math.prod(rows[:-1]), rows[-1]) if rows else (1, 1)
    ids_per_row = token_ids.shape[-1] if token_ids.dim() == logits.dim() else 1
    temperature_tensor = None
    if isinstance(temperature, Tensor):
        temperature_tensor = temperature.to(accumulate_dtype(logits)).reshape(outer).contiguous()
        temperature = 1.0
    logits = logits.reshape(*outer, logits.shape[-1])
    call = TokenLogprobsCall(
        logits=logits if logits.stride(-1) == 1 else logits.contiguous(),
        token_ids=token_ids.long().reshape(*outer, ids_per_row).contiguous(),
        mask=None if mask is None else (mask != 0).reshape(outer).contiguous(),
        temperature_tensor=temperature_tensor,
        temperature=float(temperature),
        softcap=0.0 if softcap is None else float(softcap),
        return_entropy=return_entropy,
    )
    logps, entropy = _TokenLogprobs.apply(*call, backend)
    logps = logps.reshape(token_ids.shape)
    return (logps, entropy.reshape(rows)) if return_entropy else logps


def _check(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Any,
    mask: Tensor | None,
    softcap: float | None,
    return_entropy: bool,
) -> None:
    checks.tensor("logits", logits)
    checks.tensor("token_ids", token_ids, checks.INTEGERS)
    rows = logits.shape[:-1]
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V), V >= 1, got {tuple(logits.shape)}")
    if token_ids.shape[: len(rows)] != rows or token_ids.dim() not in (len(rows), len(rows) + 1):
        raise ValueError(
            f"token_ids: expected shape {tuple(rows)} or {tuple(rows)} + (K,), one or K ids a row "
            f"of logits, got {tuple(token_ids.shape)}"
        )
    checks.same_device("token_ids", token_ids, "logits", logits)
    checks.temperature("temperature", temperature, logits, rows)
    checks.row_mask("mask", mask, logits, rows)
    if softcap is not None:
        checks.positive("softcap", softcap)
    checks.flag("return_entropy", return_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = TokenLogprobsCall._make(fields)
        logps, entropy, lse = dispatch.kernel(FORWARD, backend)(*call)
        ctx.save_for_backward(
            call.logits, call.token_ids, call.mask, call.temperature_tensor, lse, entropy
        )
        ctx.temperature, ctx.softcap = call.temperature, call.softcap
        ctx.return_entropy, ctx.backend = call.return_entropy, backend
        ctx.set_materialize_grads(False)
        if not call.return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps, grad_entropy):
        logits, token_ids, mask, temperature_tensor, lse, entropy = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros(token_ids.shape, dtype=entropy.dtype, device=lse.device)
        if not ctx.return_entropy:
            grad_entropy = None
        call = TokenLogprobsBackwardCall(
            grad_logps=grad_logps.contiguous(),
            grad_entropy=None if grad_entropy is None else grad_entropy.contiguous(),
            logits=logits,
            token_ids=token_ids,
            mask=mask,
            temperature_tensor=temperature_tensor,
            lse=lse,
            entropy=entropy,
            temperature=ctx.temperature,
            softcap=ctx.softcap,
        )
        return gradients(TokenLogprobsCall, logits=dispatch.kernel(BACKWARD, ctx.backend)(*call))


@dispatch.fake(FORWARD, "native")
def _fake_forward(*fields):
    call = TokenLogprobsCall(*fields)
    rows = call.logits.shape[:-1]
    logps = call.logits.new_empty(call.token_ids.shape, dtype=accumulate_dtype(call.logits))
    entropy = logps.new_empty(rows if call.return_entropy else 0)
    return logps, entropy, logps.new_empty(rows, dtype=torch.float64)


@dispatch.fake(FORWARD, "triton")
def _(*fields):
    logps, entropy, lse = _fake_forward(*fields)
    return logps, entropy, logps.new_empty((*lse.shape, 2))


@dispatch.fake(BACKWARD)
def _(*fields):
    logits = TokenLogprobsBackwardCall(*fields).logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
