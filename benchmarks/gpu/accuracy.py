"""Every operation on the registry's samples, forward and backward, against float64.

The samples are taken breadth first: the first of every operation, dtype and backend, then the
second. A run that is cut has seen something of everything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import calling
from apt_kernels import calls
from apt_kernels.registry import OPS, Sample
from places import device

DTYPES = (torch.float32, torch.bfloat16)


def items(only: list[str]) -> list[str]:
    cases = [
        f"{op.name}|{dtype}|{backend}"
        for op in OPS.values()
        if not only or op.name in only
        for dtype in _names(op)
        for backend in calling.backends(op.name)
    ]
    cases.sort(key=lambda case: case.endswith("native"))  # they may still be compiling
    counts = {case: len(_samples(*case.split("|")[:2])) for case in cases}
    most = max(counts.values(), default=0)
    return [f"{case}|{i}" for i in range(most) for case in cases if i < counts[case]]


def _names(op) -> list[str]:
    dtypes = [d for d in DTYPES if d in op.dtypes] or [op.dtypes[0]]
    return [str(d).removeprefix("torch.") for d in dtypes]


@functools.cache
def _samples(operation: str, dtype: str) -> list[Sample]:
    return list(OPS[operation].samples(getattr(torch, dtype)))


def measure(item: str) -> Iterator[dict]:
    operation, dtype, backend, index = item.split("|")
    op, sample = OPS[operation], _samples(operation, dtype)[int(index)]
    about = {"operation": operation, "dtype": dtype, "backend": backend, "sample": sample.name}
    calling.ours(operation, backend)  # the backend is there, or this raises
    name = None if backend == "default" else backend
    try:
        calls.assert_as_the_reference(op, sample, device(), name)
    except AssertionError as error:
        yield {**about, "status": "failed", "why": str(error).strip()[:400]}
    else:
        yield {**about, "status": "passed"}
