"""Log-softmax gathered at token ids, without the log-softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once

dispatch.define(
    "token_logprobs_fwd(Tensor logits, Tensor token_ids, Tensor? mask, Tensor? temperatures, "
    "float temperature, float softcap, bool return_entropy) -> (Tensor, Tensor, Tensor)"
)
dispatch.define(
    "token_logprobs_bwd(Tensor grad_logps, Tensor? grad_entropy, Tensor logits, "
    "Tensor token_ids, Tensor? mask, Tensor? temperatures, Tensor lse, Tensor entropy, "
    "float temperature, float softcap) -> Tensor"
)
dispatch.register("token_logprobs", "token_logprobs_fwd", "token_logprobs_bwd")


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

    Reads the logits once; backward reads them once more and writes their gradient once; between
    the two it keeps the ids and one or two numbers a row. The entropy of the full distribution
    comes from the same pass. Source: Milakov & Gimelshein 2018, "Online normalizer calculation
    for softmax".

    Slicing the logits of a model (`logits[:, :-1]`) costs no copy forward, but PyTorch copies their
    gradient back; passing all logits, the ids shifted left and a mask that is False at the last
    position gives the same gradient without the copy.

    Args:
        logits: `(..., V)` float32, bfloat16, float16 or float64; any strides; differentiable.
            A column of -inf is excluded from the vocabulary.
        token_ids: `(...)` integers in [0, V), or `(..., K)` for K tokens a row.
        temperature: a number above 0, or a tensor `(...)` of one per row (no gradient).
        mask: `(...)`, True counts. Other rows are not read, whatever they or their ids hold: their
            results are 0 and their gradients exactly 0.
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
    checks.tensor("logits", logits)
    checks.tensor("token_ids", token_ids, checks.INTEGERS)
    rows = logits.shape[:-1]
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V), V >= 1, got {tuple(logits.shape)}")
    several = token_ids.dim() == logits.dim()
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
    outer = (math.prod(rows[:-1]), rows[-1]) if rows else (1, 1)
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures = temperature.to(accumulate_dtype(logits)).reshape(outer).contiguous()
    flat_logits = logits.reshape(*outer, logits.shape[-1])
    logps, entropy = _TokenLogprobs.apply(
        flat_logits if flat_logits.stride(-1) == 1 else flat_logits.contiguous(),
        token_ids.long().reshape(*outer, token_ids.shape[-1] if several else 1).contiguous(),
        None if mask is None else (mask != 0).reshape(outer).contiguous(),
        temperatures,
        1.0 if temperatures is not None else float(temperature),
        0.0 if softcap is None else float(softcap),
        return_entropy,
        backend,
    )
    logps = logps.reshape(token_ids.shape)
    return (logps, entropy.reshape(rows)) if return_entropy else logps


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, token_ids, mask, temperatures, temperature, softcap, return_entropy, backend
    ):
        forward = dispatch.kernel("token_logprobs_fwd", backend)
        logps, entropy, lse = forward(
            logits, token_ids, mask, temperatures, temperature, softcap, return_entropy
        )
        ctx.save_for_backward(logits, token_ids, mask, temperatures, lse, entropy)
        ctx.options = (temperature, softcap, return_entropy, backend)
        ctx.set_materialize_grads(False)
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps, grad_entropy):
        logits, token_ids, mask, temperatures, lse, entropy = ctx.saved_tensors
        temperature, softcap, return_entropy, backend = ctx.options
        if grad_logps is None:
            grad_logps = torch.zeros(token_ids.shape, dtype=entropy.dtype, device=lse.device)
        grad_logits = dispatch.kernel("token_logprobs_bwd", backend)(
            grad_logps.contiguous(),
            grad_entropy.contiguous() if return_entropy and grad_entropy is not None else None,
            logits,
            token_ids,
            mask,
            temperatures,
            lse,
            entropy,
            temperature,
            softcap,
        )
        return grad_logits, None, None, None, None, None, None, None


@dispatch.fake("token_logprobs_fwd", "native")
def _fake_forward(logits, token_ids, mask, temperatures, temperature, softcap, return_entropy):
    logps = logits.new_empty(token_ids.shape, dtype=accumulate_dtype(logits))
    rows = logits.shape[:-1]
    entropy = logps.new_empty(rows if return_entropy else 0)
    return logps, entropy, logps.new_empty(rows, dtype=torch.float64)


@dispatch.fake("token_logprobs_fwd", "triton")
def _(*arguments):
    logps, entropy, lse = _fake_forward(*arguments)
    return logps, entropy, logps.new_empty((*lse.shape, 2))


@dispatch.fake("token_logprobs_bwd")
def _(grad, grad_entropy, logits, token_ids, mask, temperatures, lse, entropy, *options):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
