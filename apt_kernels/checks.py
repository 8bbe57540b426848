"""The only place that rejects arguments.

Every error names the argument, what was expected and what came. Checks read shapes, dtypes and
devices, never values, so they cost no synchronisation and torch.compile traces them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT32 = torch.finfo(torch.float32)
NUMBERS = (int, float, torch.SymFloat, torch.SymInt)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not is_dense(value):
        layout = str(value.layout).removeprefix("torch.")
        kind = "a nested tensor" if value.is_nested else f"one of layout {layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {value.dtype}")
    return value


def is_dense(value: Tensor) -> bool:
    """Neither sparse nor nested, whose elements no kernel could find."""
    return value.layout == torch.strided and not value.is_nested


def dims(name: str, value: Tensor, least: int, most: int | None = None) -> None:
    most = least if most is None else most
    if not least <= value.dim() <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"{name}: expected {expected} dimensions, got shape {_shape(value)}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({meaning}), got {_shape(value)}"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {value.device}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )


def no_shared_elements(name: str, value: Tensor) -> None:
    """Each element has memory of its own: a tensor that is written must not be expanded."""
    span = 1  # elements of memory under the dimensions of smaller stride
    for stride, size in sorted(zip(value.stride(), value.shape)):
        if size == 0:
            return
        if size > 1 and stride < span and (stride == 0 or _share_elements(value)):
            raise ValueError(
                f"{name}: expected a tensor whose elements do not share memory, as it is written, "
                f"got shape {_shape(value)} with strides {tuple(value.stride())}"
            )
        span += (size - 1) * stride


def _share_elements(value: Tensor) -> bool:
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(value.stride(), value.shape):
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
    return offsets.unique().numel() < offsets.numel()


def pair(name: str, value: Any, other_name: str, other: Tensor, constant_: bool = False) -> None:
    """A tensor of floats like another. Small losses are called often: one test if all is well."""
    if (
        isinstance(value, Tensor)
        and value.dtype in FLOATS
        and is_dense(value)
        and value.shape == other.shape
        and value.device == other.device
        and not (constant_ and value.requires_grad)
    ):
        return
    tensor(name, value)
    shape(name, value, other.shape, f"that of {other_name}")
    same_device(name, value, other_name, other)
    if constant_:
        constant(name, value)


def pairs(
    other_name: str, other: Tensor, *, constants: Collection[str] = (), **values: Tensor | None
) -> None:
    """Several tensors as `pair` checks one. `constants` names the tensors without a gradient."""
    expected, device = other.shape, other.device
    for name, value in values.items():
        if not (
            isinstance(value, Tensor)
            and value.dtype in FLOATS
            and is_dense(value)
            and value.shape == expected
            and value.device == device
            and not (value.requires_grad and name in constants)
        ):
            pair(name, value, other_name, other, constant_=name in constants)


def constant(name: str, value: Any) -> None:
    """Arguments without a gradient here: silence would be a wrong gradient."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that does not require grad, as no gradient is computed "
            "for it; compute it under torch.no_grad() or detach it"
        )


def per_row_or_token(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """One number a row or one a token of `other` `(B, T)`, without a gradient."""
    tensor(name, value)
    if tuple(value.shape) not in ((other.shape[0],), tuple(other.shape)):
        raise ValueError(
            f"{name}: expected shape {(other.shape[0],)} (one a row) or {tuple(other.shape)} "
            f"(that of {other_name}), got {_shape(value)}"
        )
    same_device(name, value, other_name, other)
    constant(name, value)


def token_mask(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """True for each element of `other` that counts."""
    tensor(name, value, (torch.bool, *INTEGERS, *FLOATS))
    shape(name, value, other.shape, f"that of {other_name}")
    same_device(name, value, other_name, other)


def normalizer(value: Any, other_name: str, other: Tensor) -> None:
    """The denominator of a loss: None, a positive number or a 0-dim tensor."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        positive("normalizer", value)
        return
    tensor("normalizer", value, (*INTEGERS, *FLOATS))
    dims("normalizer", value, 0)
    same_device("normalizer", value, other_name, other)
    constant("normalizer", value)


def row_mask(name: str, value: Tensor | None, like: Tensor, expected: Sequence[int]) -> None:
    if value is None:
        return
    tensor(name, value, (torch.bool, *INTEGERS, *FLOATS))
    shape(name, value, expected, "one entry a row, True counts")
    same_device(name, value, "the first argument", like)


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def finite(name: str, value: Any) -> None:
    number(name, value)
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def integer(name: str, value: Any, least: int | None = None, end: float = float("inf")) -> None:
    """An integer in [least, end)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if least is not None and not least <= value < end:
        raise ValueError(f"{name}: expected an integer in [{least}, {end}), got {value}")


def positive(name: str, value: Any) -> None:
    number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if not FLOAT32.tiny <= value <= FLOAT32.max:  # kernels would take it for 0 or infinity
        raise ValueError(
            f"{name}: expected a number in the range of float32, {FLOAT32.tiny:.2g} to "
            f"{FLOAT32.max:.2g}, got {value}"
        )


def at_least_zero(name: str, value: Any) -> None:
    number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def between(name: str, value: Any, low: float, high: float, *, open_end: bool = False) -> None:
    number(name, value)
    if not (low <= value < high if open_end else low <= value <= high):
        end = ")" if open_end else "]"
        raise ValueError(f"{name}: expected a number in [{low}, {high}{end}, got {value}")


def choice(name: str, value: Any, options: Collection[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {list(options)}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """True or False: any other value would be taken for one of them in silence."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def iterable(name: str, value: Any, of: str) -> None:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {of}, got {type(value).__name__}")


def unused(name: str, value: Any, why: str) -> None:
    """An option that would be ignored is an error."""
    if value is not None:
        raise ValueError(f"{name}: expected None ({why}), got {value!r}")


def temperature(name: str, value: Any, like: Tensor, expected: Sequence[int]) -> None:
    """A positive number, or one per row."""
    if not isinstance(value, Tensor):
        positive(name, value)
        return
    tensor(name, value)
    shape(name, value, expected, "one temperature a row")
    same_device(name, value, "the first argument", like)
    constant(name, value)
