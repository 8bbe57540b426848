"""One side of a row as a function of the benchmark's arguments: ours, PyTorch's or a peer's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import apt_kernels
import cuda_build
from apt_kernels.commands import gpu_peers
from apt_kernels.registry import OPS, Benchmark, Sample
from places import device


def backends(operation: str) -> list[str]:
    """Our backends by name, the default first. "default" where an operation calls others."""
    found = apt_kernels.backends()["operations"][operation][device()]
    kernels = [name for name in found if name != "reference"]
    if device() == "cuda" and operation in cuda_build.operations() and "native" not in kernels:
        kernels.append("native")
    return kernels or ["default"]


def ours(operation: str, backend: str) -> Callable:
    function = OPS[operation].function
    if backend == "default":
        return function
    if backend == "native" and device() == "cuda":
        cuda_build.load()
    return functools.partial(function, backend=backend)


def variants(operation: str, bench: Benchmark) -> list[str]:
    """Names of all sides: ours and eager PyTorch first."""
    first, *others = (f"ours: {name}" for name in backends(operation))
    return [first, "eager", *others, *(["compiled"] if bench.compiled else []), "peers"]


def functions(operation: str, bench: Benchmark, variant: str) -> Iterator[tuple[str, Callable]]:
    """The functions of one side by name; of "peers" as many as are installed."""
    if variant.startswith("ours: "):
        yield variant, ours(operation, variant.removeprefix("ours: "))
    elif variant == "eager":
        yield variant, bench.eager
    elif variant == "compiled":
        torch._dynamo.reset()
        yield variant, torch.compile(bench.eager)
    else:
        yield from gpu_peers.of(operation)[0].items() if device() == "cuda" else ()
        for peer in bench.peers:
            try:
                yield from peer().items()
            except ImportError:  # the page lists what is installed
                continue


def sample_of(bench: Benchmark, dtype: torch.dtype) -> Sample:
    """The arguments, made on the device."""
    with torch.device(device()):
        return bench.make(dtype)
