"""Log-probabilities of tokens: from logits, from hidden states through an output head, and summed.

The references of other losses are made of them.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .numerics import accumulate_dtype, keep


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = False,
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
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns z[id] - logsumexp(z), z = cap(logits) / temperature, and the entropy of softmax(z).

    cap(x) = softcap * tanh(x / softcap); a column of -inf stays -inf, has probability 0 and adds
    0 to the entropy and to its gradient. Rows that hold nothing but -inf give NaN, as PyTorch's
    log-softmax does. Source: Milakov & Gimelshein 2018, "Online normalizer calculation for
    softmax".

    Arguments and results as `apt_kernels.token_logprobs`.
    """
    dtype = accumulate_dtype(logits)
    several = token_ids.dim() == logits.dim()
    ids = token_ids.long() if several else token_ids.long().unsqueeze(-1)
    row_mask = None if mask is None else mask.bool().unsqueeze(-1)
    x = keep(row_mask, logits.to(dtype))
    if row_mask is not None:
        ids = ids.masked_fill(~row_mask, 0)
    logps, log_probs = _gathered_log_softmax(scaled_logits(x, temperature, mask, softcap), ids)
    logps = keep(row_mask, logps)
    logps = logps if several else logps.squeeze(-1)
    if not return_entropy:
        return logps
    excluded = log_probs == -torch.inf  # beside a larger one a finite logit may be, too
    terms = log_probs.exp() * log_probs.masked_fill(excluded, 0.0)
    return logps, keep(mask, -terms.sum(-1))


def scaled_logits(
    x: Tensor, temperature: float | Tensor, mask: Tensor | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        x = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
    if isinstance(temperature, Tensor):
        temperature = keep(mask, temperature.to(x.dtype).expand(x.shape[:-1]), 1.0).unsqueeze(-1)
    return x / temperature


def _gathered_log_softmax(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(z, dim=-1)
    if z.device.type == "cpu":
        return log_probs.gather(-1, ids), log_probs
    valid = (ids >= 0) & (ids < z.shape[-1])  # a wild gather would end the CUDA context
    logps = log_probs.gather(-1, ids.masked_fill(~valid, 0))
    return logps.masked_fill(~valid, torch.nan), log_probs


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, mask: Tensor | None
) -> Tensor:
    """Returns logit_scale * (hidden @ weight^T + bias), masked rows of `hidden` taken as 0."""
    dtype = accumulate_dtype(hidden, weight, bias)
    row_mask = None if mask is None else mask.bool().unsqueeze(-1)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the products to bf16
        logits = keep(row_mask, hidden.to(dtype)) @ weight.to(dtype).mT
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logit_scale * logits


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: Tensor | None = ...,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns `token_logprobs` of the logits logit_scale * (hidden @ weight^T + bias).

    Arguments and results as `apt_kernels.linear_token_logprobs`.
    """
    logits = head_logits(hidden, weight, bias, logit_scale, mask)
    return token_logprobs(
        logits,
        token_ids,
        temperature=temperature,
        mask=mask,
        softcap=softcap,
        return_entropy=return_entropy,
    )


def sequence_logps(logps: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Returns the sum (or mean) of each row's log-probabilities where `mask` is true.

    Arguments and results as `apt_kernels.sequence_logps`.
    """
    total = keep(mask, logps.to(accumulate_dtype(logps))).sum(-1)
    return total / mask.bool().sum(-1).clamp(min=1) if average else total
