"""The dtype of products under `torch.autocast`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def as_autocast(*factors: Tensor | None) -> tuple[Any, ...]:
    """Returns the factors of a product in the dtype of autocast, as `F.linear` takes them.

    The conversion is differentiable: gradients arrive in the dtype of the factors. Autocast leaves
    float64 alone, so a product with a float64 factor stays as it is.
    """
    given = [t for t in factors if t is not None]
    device = given[0].device.type
    if not torch.is_autocast_enabled(device) or any(t.dtype not in _CAST for t in given):
        return factors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in factors)
