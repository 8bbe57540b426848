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
    """Every sample asks for the number of right predictions; the first comes without it, too."""

    @functools.wraps(samples)
    def asking(dtype: torch.dtype) -> Iterator[Sample]:
        for i, sample in enumerate(samples(dtype)):
            yield replace(sample, kwargs={**sample.kwargs, "return_correct": True})
            if i == 0:
                yield replace(sample, name=f"{sample.name}_loss_alone")

    return asking
