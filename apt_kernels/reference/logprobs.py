"""Log-probabilities of tokens: from logits, and from hidden states through the output head."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import accumulate_dtype, keep


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

    Args:
        logits: `(..., V)`, differentiable.
        token_ids: `(...)`, or `(..., K)` for K tokens of one row.
        temperature: a number, or one per row `(...)`.
        mask: `(...)`, True counts. Masked rows are never read: outputs and gradients are 0.
        softcap: the bound of the tanh cap, or None.
        return_entropy: also return the entropy `(...)`.

    Returns:
        `logps`, shaped as `token_ids`, or `(logps, entropy)`. An unmasked id outside [0, V) is an
        error on the CPU and gives NaN elsewhere.
    """
    dtype = accumulate_dtype(logits)
    several = token_ids.dim() == logits.dim()
    ids = token_ids.long() if several else token_ids.long().unsqueeze(-1)
    row_mask = None if mask is None else mask.bool().unsqueeze(-1)
    x = keep(row_mask, logits.to(dtype))
    if row_mask is not None:
        ids = ids.masked_fill(~row_mask, 0)
    logps, log_probs = _gathered_log_softmax(_scaled(x, temperature, mask, softcap), ids)
    logps = keep(row_mask, logps)
    logps = logps if several else logps.squeeze(-1)
    if not return_entropy:
        return logps
    excluded = log_probs == -torch.inf  # beside a larger one a finite logit may be, too
    terms = log_probs.exp() * log_probs.masked_fill(excluded, 0.0)
    return logps, keep(mask, -terms.sum(-1))


def _scaled(
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

    Args:
        hidden: `(..., D)`, differentiable.
        weight: `(V, D)`, the output embedding, differentiable.
        token_ids: `(...)`.
        bias: `(V,)` or None, differentiable.
        temperature: a number, or one per row `(...)`.
        softcap: the bound of the tanh cap, applied after `logit_scale`, or None.
        logit_scale: a factor of the logits.
        mask: `(...)`, True counts. Masked rows give 0 and add nothing to any gradient.
        return_entropy: also return the entropy `(...)`.

    Returns:
        `logps` `(...)`, or `(logps, entropy)`.
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


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy of the head's logits and how many rows it predicted right.

    A row costs -(1 - s) log p[label] - s / V * sum_v log p[v], s = label_smoothing (Szegedy 2016),
    p = softmax(cap(logit_scale * (hidden @ weight^T + bias))).

    Args:
        hidden: `(..., D)`, differentiable.
        weight: `(V, D)`, differentiable.
        labels: `(...)`; rows whose label is `ignore_index` count for nothing.
        bias: `(V,)` or None, differentiable.
        ignore_index: the label of rows that do not count.
        label_smoothing: s, in [0, 1).
        reduction: "mean", "sum" or "none".
        normalizer: what "mean" divides the sum by; None: the number of rows that count. No row
            that counts: the loss is 0 and has a graph.
        softcap: the bound of the tanh cap, applied after `logit_scale`, or None.
        logit_scale: a factor of the logits.

    Returns:
        `(loss, correct)`: the loss, 0-dim or `(...)` for "none", and a 0-dim int64 count of the
        counting rows whose largest logit (the first of equals) is their label.
    """
    counts = labels != ignore_index
    logits = head_logits(hidden, weight, bias, logit_scale, counts)
    logits = keep(counts.unsqueeze(-1), logits)  # a bias of -inf or NaN must not reach these rows
    log_probs = torch.log_softmax(_scaled(logits, 1.0, None, softcap), dim=-1)
    safe_labels = labels.long().masked_fill(~counts, 0)
    losses = -log_probs.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    losses = keep(counts, losses)
    correct = ((logits.detach().argmax(-1) == safe_labels) & counts).sum()
    if reduction == "none":
        return losses, correct
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / (counts.sum().clamp(min=1) if normalizer is None else normalizer)
    return loss, correct
