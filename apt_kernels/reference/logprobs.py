"""The cross-entropy of an output head."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .head import head_logits, scaled_logits
from .numerics import keep


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the cross-entropy of the head's logits.

    A row costs -(1 - s) log p[label] - s / V * sum_v log p[v], s = label_smoothing (Szegedy 2016),
    p = softmax(cap(logit_scale * (hidden @ weight^T + bias))).

    Arguments and results as `apt_kernels.linear_cross_entropy`. No row that counts: the loss is 0
    and has a graph.
    """
    counts = labels != ignore_index
    logits = head_logits(hidden, weight, bias, logit_scale, counts)
    logits = keep(counts.unsqueeze(-1), logits)  # a bias of -inf or NaN must not reach these rows
    log_probs = torch.log_softmax(scaled_logits(logits, 1.0, None, softcap), dim=-1)
    safe_labels = labels.long().masked_fill(~counts, 0)
    losses = -log_probs.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    losses = keep(counts, losses)
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        number = counts.sum().clamp(min=1) if normalizer is None else normalizer
        loss = loss / torch.as_tensor(number, dtype=loss.dtype, device=loss.device)
    if not return_correct:
        return loss
    return loss, ((logits.detach().argmax(-1) == safe_labels) & counts).sum()
