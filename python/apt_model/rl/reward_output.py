"""The rewards in what a reward model returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = ("rewards", "logits")  # as keys or attributes: ours, and those of transformers' classifiers
FORMS = (
    "a reward model must return rewards as a tensor (B,) or (B, 1) or as B numbers, bare, as "
    "`rewards` or `logits` of a dictionary or an output, or first in a tuple"
)


class RewardOutputError(TypeError, ValueError):
    """A reward model returned what is not one number a row."""


def rewards_of(output: Any, rows: int, name: str = "the reward model's rewards") -> Tensor:
    """Returns the rewards `(rows,)` in what a reward model returned, with their graph.

    Args:
        output: `(rows,)` or `(rows, 1)`, bare, as `rewards` or `logits` (keys or attributes), or
            first in a tuple; or a list of `rows` numbers or tensors of one number.
        rows: how many sequences it was given.
        name: of the output, for errors.

    Raises:
        RewardOutputError: it is something else; the message says what to return.
    """
    found = _found(output, rows)
    if found is None or found.is_complex():
        raise RewardOutputError(
            f"{name} must be a tensor, {rows} numbers or {{'rewards': …}} of them, got "
            f"{_described(output)}; {FORMS}"
        )
    if found.shape not in ((rows,), (rows, 1)):
        several = found.dim() == 2 and found.shape[0] == rows and found.shape[1] > 1
        hint = " (a classifier with num_labels=1)" if several else ""
        raise RewardOutputError(
            f"{name} must be one a row, {rows}, got {tuple(found.shape)} of {_described(output)}; "
            f"{FORMS}{hint}"
        )
    found = found.reshape(rows)
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


def _found(output: Any, rows: int) -> Tensor | None:
    if output is None or isinstance(output, (str, bytes)):
        return None
    if isinstance(output, Tensor):
        return output
    for name in NAMES:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if value is not None:
            return _found(value, rows)
    if isinstance(output, Mapping):
        return None
    if isinstance(output, (list, tuple)):
        return _of_sequence(output, rows)
    return _as_tensor(output)


def _of_sequence(output: list[Any] | tuple[Any, ...], rows: int) -> Tensor | None:
    """Returns one number an item where these are the rows, else what the first item holds."""
    if not output:
        return None
    if len(output) == rows and all(isinstance(x, Tensor) and x.numel() == 1 for x in output):
        return torch.stack([x.reshape(()) for x in output])
    if any(isinstance(x, (Tensor, Mapping)) or hasattr(x, "logits") for x in output):
        return _found(output[0], rows) if isinstance(output, tuple) else None
    return _as_tensor(output)


def _as_tensor(output: Any) -> Tensor | None:
    try:
        return torch.as_tensor(output, dtype=torch.float64).to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None


def _described(output: Any) -> str:
    kind = type(output).__name__
    return f"{kind} with {list(output)}" if isinstance(output, Mapping) else kind
