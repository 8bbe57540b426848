"""The table of checks, and random numbers for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHECKS: dict[str, Callable] = {}
SMALL: list[str] = []

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(name: str = "", small: bool = False) -> Callable[[Callable], Callable]:
    """Decorates a function of a backend: one more check, of the function's name or of this."""

    def add(function: Callable) -> Callable:
        key = name or function.__name__
        assert key not in CHECKS
        CHECKS[key] = function
        if small:
            SMALL.append(key)
        return function

    return add


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def randint(*shape: int, below: int, seed: int = 1) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))
