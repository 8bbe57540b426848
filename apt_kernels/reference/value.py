"""The loss of value functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import accumulate_dtype, aggregate, at_least_one, keep


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the aggregate of max((v - R)^2, (v' - R)^2) / 2 and metrics.

    v' = clamp(v, old_values - clip_range, old_values + clip_range); without a `clip_range` it is
    (v - R)^2 / 2. Source: Schulman 2017 and the implementation of Dhariwal 2017.

    Args:
        values: `(B, T)`, differentiable.
        returns: `(B, T)`.
        mask: `(B, T)`, True counts.
        old_values: `(B, T)`, the values at sampling time.
        clip_range: how far the value may move.
        aggregation: as in `policy_loss`.
        normalizer: as in `policy_loss`.

    Returns:
        `(loss, metrics)`: `clip_fraction`, and `explained_variance` = 1 - Var(R - v) / Var(R)
        over the tokens that count, 0 where their returns are all equal.
    """
    dtype = accumulate_dtype(values)
    mask = mask.bool()
    v, target = keep(mask, values.to(dtype)), keep(mask, returns.detach().to(dtype))
    losses = (v - target) ** 2
    clipped = torch.zeros_like(mask)
    if clip_range is not None:
        old = keep(mask, old_values.detach().to(dtype))
        bounded = torch.minimum(torch.maximum(v, old - clip_range), old + clip_range)
        bounded_losses = (bounded - target) ** 2
        clipped = bounded_losses > losses
        losses = torch.where(clipped, bounded_losses, losses)
    loss = aggregate(0.5 * losses, mask, aggregation, normalizer)
    tokens = at_least_one(mask.sum())
    spread = _sum_of_squares(target, mask, tokens)
    unexplained = _sum_of_squares(target - v.detach(), mask, tokens)
    explained = 1 - unexplained / torch.where(spread > 0, spread, torch.ones_like(spread))
    explained = torch.where((spread > 0) & _vary(target, mask), explained, 0.0)
    return loss, {
        "clip_fraction": (clipped & mask).sum().to(dtype) / tokens,
        "explained_variance": explained,
    }


def _vary(values: Tensor, mask: Tensor) -> Tensor:
    """Whether the values that count are not all equal: around a rounded mean these vary too."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    largest = values.masked_fill(~mask, -torch.inf).amax()
    return largest > values.masked_fill(~mask, torch.inf).amin()


def _sum_of_squares(values: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Sum of squared distances from the mean, over the tokens that count."""
    return (keep(mask, values - keep(mask, values).sum() / tokens) ** 2).sum()
