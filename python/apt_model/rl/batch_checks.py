"""Checks of what a batch is made of; every error names the argument and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def checked_ids(name: str, ids: Tensor, device: torch.device | str) -> Tensor:
    """Returns ids `(B, S)` on the device."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        came = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be a tensor (B, S) of integers, not empty, got {came}")
    return ids.to(device, torch.long)


def checked_mask(name: str, mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Returns a mask of `ids` as bools, where they are; None for None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a tensor {tuple(ids.shape)} as its ids, got {came}")
    return mask.to(ids.device) != 0


def checked_prompt_lengths(
    lengths: int | Sequence[int] | Tensor, rows: int, device: torch.device | str
) -> Tensor:
    """Returns one length a row, `(B,)`."""
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.shape not in ((), (rows,)):
        raise ValueError(
            f"prompt_lengths must be an integer or ({rows},) integers, "
            f"got {tuple(lengths.shape)} {lengths.dtype}"
        )
    return lengths.to(device).expand(rows)


def check_vocabulary(name: str, ids: Tensor, size: int | None) -> None:
    """Raises ValueError for ids outside [0, size), where looking does not wait."""
    if size is None or ids.device.type != "cpu":
        return
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must be in [0, {size}), the policy's vocabulary, got {int(low)} to {int(high)}"
        )


def check_real_rows(name: str, mask: Tensor) -> None:
    """Raises ValueError for a row without a real token, where looking does not wait."""
    if mask.device.type != "cpu":
        return
    empty = (mask == 0).all(-1).nonzero()
    if len(empty):
        raise ValueError(f"row {int(empty[0])} of {name} has no real token")


def check_responses(name: str, counted: Tensor) -> None:
    """Raises ValueError for a row of which no token counts, where looking does not wait."""
    if counted.device.type != "cpu" or counted.any(-1).all():
        return
    row = int((~counted.any(-1)).nonzero()[0])
    raise ValueError(f"row {row} of {name} has an empty response: no token to learn from")
