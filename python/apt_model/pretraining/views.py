"""The two views of a contrastive batch, checked, and how they go through an encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class View(NamedTuple):
    """One view of B samples: token ids `(B, S)` with a mask, or `(B, …)` floats."""

    inputs: Tensor
    mask: Tensor | None

    def rows(self, rows: slice) -> View:
        """Returns some of the samples."""
        return View(self.inputs[rows], None if self.mask is None else self.mask[rows])


def make_views(
    input_ids_1: Tensor,
    input_ids_2: Tensor,
    attention_mask_1: Tensor | None = None,
    attention_mask_2: Tensor | None = None,
    *,
    device: torch.device | str,
    vocabulary_size: int | None = None,
) -> list[View]:
    """Returns both views of a batch, as `make_view` does; they must have as many rows."""
    first = make_view("input_ids_1", input_ids_1, attention_mask_1, device, vocabulary_size)
    second = make_view("input_ids_2", input_ids_2, attention_mask_2, device, vocabulary_size)
    if len(first.inputs) != len(second.inputs):
        raise ValueError(
            f"input_ids_2 must have {len(first.inputs)} rows as input_ids_1, "
            f"got {len(second.inputs)}"
        )
    return [first, second]


def make_view(
    name: str,
    inputs: Tensor,
    mask: Tensor | None,
    device: torch.device | str,
    vocabulary_size: int | None = None,
) -> View:
    """Returns a checked view on `device`; ids of padding become 0.

    Args:
        name: of the argument, for errors.
        inputs: `(B, S)` integers, or floats `(B, …)`.
        mask: `(B, S)`, 1 = real token; None: all are.
        device: where the view is wanted.
        vocabulary_size: ids beyond it are an error (checked on the CPU only: elsewhere it would
            wait for the device, as would the search for rows without a real token).

    Raises:
        ValueError: names the argument that does not fit.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or inputs.numel() == 0:
        came = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"{name} must be a tensor (B, …), not empty, got {came}")
    if not inputs.is_floating_point() and inputs.dim() != 2:
        raise ValueError(f"{name} of integers must be (B, S), got {tuple(inputs.shape)}")
    if mask is None:
        if vocabulary_size is not None:
            _check_ids(name, inputs, vocabulary_size)
        return View(inputs.to(device), None)
    if not isinstance(mask, Tensor) or mask.shape != inputs.shape[:2]:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of {name} must be a tensor {tuple(inputs.shape[:2])}, got {came}"
        )
    real = mask.to(inputs.device) != 0
    if real.device.type == "cpu" and not real.any(1).all():
        raise ValueError(f"{name}: row {int(real.any(1).long().argmin())} has no real token")
    if not inputs.is_floating_point():
        inputs = inputs.masked_fill(~real, 0)
        if vocabulary_size is not None:
            _check_ids(name, inputs, vocabulary_size)
    return View(inputs.to(device), real.to(device).long())


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.is_floating_point() or ids.device.type != "cpu":
        return
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must be in [0, {size}), the encoder's vocabulary, got {int(low)} to "
            f"{int(high)}"
        )


def joined(views: list[View], takes_mask: bool) -> View | None:
    """Returns the views as one batch, shorter texts padded; None where that changes the result."""
    shapes = {tuple(view.inputs.shape[1:]) for view in views}
    masks = [view.mask for view in views]
    if len(shapes) == 1 and all(mask is None for mask in masks):
        return View(torch.cat([view.inputs for view in views]), None)
    if not takes_mask or any(view.inputs.dim() != 2 for view in views):
        return None
    width = max(view.inputs.shape[1] for view in views)
    inputs, real = [], []
    for view in views:
        mask = torch.ones_like(view.inputs) if view.mask is None else view.mask
        inputs.append(F.pad(view.inputs, (0, width - view.inputs.shape[1])))
        real.append(F.pad(mask, (0, width - mask.shape[1])))
    return View(torch.cat(inputs), torch.cat(real))


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Returns `(B, H)` of `(B, S, H)`: the mean of the real tokens, or the first one."""
    if hidden.dim() == 2:
        return hidden
    if pooling == "first":
        if mask is None:
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(1)]
    if mask is None:
        return hidden.mean(1)
    total = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)
