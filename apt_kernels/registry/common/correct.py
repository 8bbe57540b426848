"""Samples of the losses that can also count right predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..entry import Sample


def counted(
    samples: Callable[[torch.dtype], Iterator[Sample]],
) -> Callable[[torch.dtype], Iterator[Sample]]:
    """Every sample asks for the number of right predictions.

    "plain" and "none" come again without the number, last of all. The first samples of an
    operation, whose machine code is in a table, then remain different calls of its kernels.
    """

    @functools.wraps(samples)
    def asking(dtype: torch.dtype) -> Iterator[Sample]:
        alone = []
        for sample in samples(dtype):
            yield replace(sample, kwargs={**sample.kwargs, "return_correct": True})
            if sample.name in ("plain", "none"):
                alone.append(replace(sample, name=f"{sample.name}_loss_alone"))
        yield from alone

    return asking
