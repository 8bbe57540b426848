"""The description of one operation: its functions, samples, benchmarks and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device: `with torch.device("cuda")` moves it and the tensors."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@dataclass(frozen=True)
class Sample:
    """One call. Floating tensors that require grad are differentiated in the tests."""

    name: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A wrong call and the words its error must contain."""

    name: str
    args: tuple
    kwargs: dict[str, Any]
    error: type[Exception]
    message: str  # a regular expression


@dataclass(frozen=True)
class Benchmark:
    """One row of `benchmarks/run.py`.

    make(dtype) gives the arguments, on the default device; eager is the plain PyTorch that a user
    would write, of the same arguments. Both must return the differentiable result first.
    bytes_moved and backward_bytes_moved are the floor: what the memory must carry, forward and
    backward; flops and backward_flops what the products need, where there are any.
    """

    name: str
    make: Callable[[torch.dtype], Sample]
    eager: Callable
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    backward: bool = True
    bytes_moved: Callable[[Sample], int] | None = None
    backward_bytes_moved: Callable[[Sample], int] | None = None
    flops: Callable[[Sample], int] | None = None
    backward_flops: Callable[[Sample], int] | None = None
    # Each gives another library's functions of the same arguments, by name; imported when called,
    # and left out where it is not installed.
    peers: tuple[Callable[[], dict[str, Callable]], ...] = ()
    # The least work, by name: a plain pass over the memory, or the products alone. The forward pass
    # is compared with `floor`, both passes together with `backward_floor`.
    floor: dict[str, Callable] = field(default_factory=dict)
    backward_floor: dict[str, Callable] = field(default_factory=dict)
    comparable: bool = True  # the same values: checked before time is taken
    compiled: bool = True  # compare with torch.compile(eager) as well
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Op:
    name: str
    function: Callable
    reference: Callable
    kernels: tuple[str, ...]  # names in torch.ops.apt, for opcheck
    samples: Callable[[torch.dtype], Iterator[Sample]]
    of_length: Callable[[int], Sample]  # a call of another length, for recompilation tests
    rejected: Callable[[], Iterator[Rejected]]
    source: str
    benchmarks: tuple[Benchmark, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    # The arguments that autocast casts: the factors of the products.
    autocast: tuple[str, ...] = ()
    summary: str = ""

    def sample(self, name: str, dtype: torch.dtype = torch.float32) -> Sample:
        """One call by the name that a failing test shows."""
        for sample in self.samples(dtype):
            if sample.name == name:
                return sample
        names = ", ".join(s.name for s in self.samples(dtype))
        raise ValueError(f"name: expected a sample of {self.name} ({names}), got {name!r}")
