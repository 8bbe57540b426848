"""Shared by the references: the accumulation dtype, row masks and reductions."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def keep(mask: Tensor | None, values: Tensor, fill: float = 0.0) -> Tensor:
    """Returns `values` where `mask` is true and `fill` elsewhere, with zero gradient there.

    A product with the mask would leave NaN (0 * inf) in the value and in the gradient.
    """
    if mask is None:
        return values
    return torch.where(mask.bool(), values, torch.full_like(values, fill))


def reduce_loss(losses: Tensor, reduction: str) -> Tensor:
    """Returns `losses` ("none"), their sum ("sum") or their mean ("mean", 0 for no losses)."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.numel(), 1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0 and near -inf (Mächler 2012).

    Each branch sees only arguments at which it is finite, so that neither leaves NaN in the
    gradient of the other.
    """
    near_zero = x > -0.6931471805599453
    small = torch.where(near_zero, x, torch.full_like(x, -0.5))
    large = torch.where(near_zero, torch.full_like(x, -1.0), x)
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)


def aggregate(
    losses: Tensor, mask: Tensor, aggregation: str, normalizer: float | Tensor | None
) -> Tensor:
    """Returns one number from the losses of tokens `(B, T)`: see the table of `policy_loss`.

    It has the dtype of the losses, also where the normalizer is a tensor of another one.
    """
    lengths = mask.sum(-1)
    rows = at_least_one((lengths > 0).sum())
    if aggregation == "sequence_mean":
        losses = losses / at_least_one(lengths).unsqueeze(-1)
    if normalizer is None:
        denominators: dict[str, float | Tensor] = {
            "token_mean": at_least_one(lengths.sum()),
            "token_sum": 1.0,
            "sequence_mean": rows,
            "sequence_sum": rows,
            "dr_grpo": rows * max(mask.shape[-1], 1),
        }
        normalizer = denominators[aggregation]
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(losses.dtype)
    return keep(mask, losses).sum() / normalizer
