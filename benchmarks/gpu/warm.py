"""Every side of the rows is called once: what it compiles is in the caches when it is timed.

These processes run beside those of the accuracy, on the processor's other cores. Each may take a
share of the GPU's memory, so that they leave enough for the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch

import calling
import targets
from apt_kernels.commands.comparison import passes
from places import device

SHARE = 0.28  # of the GPU's memory, for one process


def items(only: list[str]) -> list[str]:
    """Eager PyTorch has nothing to compile."""
    return [
        f"{operation}|{shape}|{variant}"
        for operation in targets.ROWS
        if not only or operation in only
        for shape in targets.shapes(operation)
        for variant in calling.variants(operation, targets.benchmark(operation, shape))
        if variant != "eager"
    ]


@functools.cache
def _limit_memory() -> None:
    if device() == "cuda":
        torch.cuda.set_per_process_memory_fraction(SHARE)


def measure(item: str) -> Iterator[dict]:
    _limit_memory()
    operation, shape, variant = item.split("|")
    bench = targets.benchmark(operation, shape)
    sample = calling.sample_of(bench, targets.dtype_of(operation))
    for name, function in calling.functions(operation, bench, variant):
        begin = time.monotonic()
        for run in passes(function, sample, bench.backward).values():
            run()
        if device() == "cuda":
            torch.cuda.synchronize()
        yield {"status": "compiled", "variant": name, "seconds": time.monotonic() - begin}
