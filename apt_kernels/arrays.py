"""NumPy arrays in the place of tensors, as data-loader workers hold them."""

from __future__ import annotations

from typing import Any

import numpy
import torch


def is_array(value: Any) -> bool:
    return isinstance(value, numpy.ndarray)


def described(name: str, value: Any) -> Any:
    """A tensor of an array's shape and dtype, without data: what the checks look at."""
    if value is None:
        return None
    if not is_array(value):
        raise TypeError(
            f"{name}: expected a NumPy array, as the first argument is one, got "
            f"{type(value).__name__}"
        )
    try:
        dtype = torch.from_numpy(numpy.empty(0, value.dtype)).dtype
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected an array of numbers, got dtype {value.dtype}") from None
    return torch.empty(value.shape, dtype=dtype, device="meta")


def plain(value: Any) -> Any:
    """The number of a NumPy scalar."""
    return value.item() if isinstance(value, numpy.generic) else value


def copied(value: Any) -> Any:
    """The tensor of an array, with memory of its own: an array may be read-only."""
    return torch.from_numpy(numpy.array(value, order="C")) if is_array(value) else value


def shared(name: str, value: Any) -> Any:
    """The tensor on an array's memory; of a copy where a tensor cannot be; None for None."""
    if described(name, value) is None:
        return None
    if not value.flags.writeable or any(stride < 0 for stride in value.strides):
        value = value.copy()
    return torch.from_numpy(value)


def contiguous(value: Any) -> Any:
    """The array or tensor without gaps, itself where it has none; None for None."""
    if value is None:
        return None
    return numpy.ascontiguousarray(value) if is_array(value) else value.contiguous()


def contiguous_int64(value: Any) -> Any:
    """The same, in 64-bit integers."""
    if value is None:
        return None
    if is_array(value):
        return numpy.ascontiguousarray(value, numpy.int64)
    return value.long().contiguous()
