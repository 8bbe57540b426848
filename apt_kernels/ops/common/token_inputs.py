"""The inputs of losses of tokens `(B, T)`, as their kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference.numerics import accumulate_dtype


def adjacent(t: Tensor) -> Tensor:
    """The tensor with rows of stride 1; it is copied only where they have another stride."""
    return t if t.dim() < 2 or t.stride(-1) == 1 else t.contiguous()


def boolean(mask: Tensor) -> Tensor:
    """The mask as booleans: True where it is not 0."""
    return mask if mask.dtype == torch.bool else mask != 0


def alike(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors in one dtype: their common one, else the accumulation dtype of the first.

    Rows have stride 1. The list holds None where an argument is None.
    """
    tensors: tuple[Tensor | None, ...] = (first, *others)
    for t in others:  # small losses are called often: no conversion where all is well
        if t is not None and t.dtype != first.dtype:
            dtype = accumulate_dtype(first)
            tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
            break
    return [None if t is None else adjacent(t) for t in tensors]


def normalizer_tensor(value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The normalizer as a 0-dim tensor in the accumulation dtype of `like`, or None."""
    if value is None:
        return None
    dtype = accumulate_dtype(like)
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)
