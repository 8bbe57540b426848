"""What the losses of tokens `(B, T)` share: aggregation, and inputs as their kernels want them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.numerics import accumulate_dtype

# The argument `aggregation` of the kernels.
AGGREGATIONS = {
    "token_mean": 0, "token_sum": 1, "sequence_mean": 2, "sequence_sum": 3, "dr_grpo": 4,
}  # fmt: skip


def adjacent(t: Tensor) -> Tensor:
    """The tensor with adjacent elements in a row; a copy only where they are not."""
    return t if t.dim() < 2 or t.stride(-1) == 1 else t.contiguous()


def boolean(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def alike(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in one dtype: their own, or what the first is accumulated in; rows adjacent."""
    dtype = tensors[0].dtype
    if any(t is not None and t.dtype != dtype for t in tensors):
        dtype = accumulate_dtype(tensors[0])
    return [None if t is None else adjacent(t.to(dtype)) for t in tensors]


def normalizer_tensor(value: float | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    dtype = accumulate_dtype(like)
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)
