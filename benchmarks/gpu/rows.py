"""The rows: our backends, eager PyTorch, torch.compile and the installed peers, each by itself.

Every side is an item of its own with tensors of its own, made on the device: one that runs out of
memory takes no other with it. All sides get the same numbers, and the sums of what they return are
kept beside the times, so that a wrong result is seen at the shape that was timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import calling
import targets
import timing
from apt_kernels.commands import measure as memory
from apt_kernels.commands.comparison import first, leaves, passes, result_bytes
from apt_kernels.registry import OPS, Benchmark, Sample
from faults import ends_the_process, failure

SECONDS = 0.4  # for one pass of one side


def items(only: list[str]) -> list[str]:
    """Our default and eager of all rows first, then our other backends, compilers and peers."""
    found = []
    for operation in targets.ROWS:
        dtypes = [str(targets.dtype_of(operation)).removeprefix("torch.")]
        dtypes += ["float32"] if torch.float32 in OPS[operation].dtypes else []
        for shape in targets.shapes(operation) if not only or operation in only else ():
            bench = targets.benchmark(operation, shape)
            for rank, dtype in enumerate(dtypes):
                for place, variant in enumerate(calling.variants(operation, bench)):
                    found.append((rank, max(place, 1), f"{operation}|{shape}|{dtype}|{variant}"))
    return [item for *_, item in sorted(found, key=lambda row: row[:2])]


def measure(item: str) -> Iterator[dict]:
    operation, shape, dtype, variant = item.split("|")
    bench = targets.benchmark(operation, shape)
    sample = calling.sample_of(bench, getattr(torch, dtype))
    about = {"operation": operation, "shape": shape, "dtype": dtype}
    for name, function in calling.functions(operation, bench, variant):
        for part, run in _passes(operation, name, function, sample, bench).items():
            yield {**about, "variant": name, "pass": part, **_measured(run, bench, sample, part)}


def _passes(
    operation: str, variant: str, function: Callable, sample: Sample, bench: Benchmark
) -> dict[str, Callable]:
    """forward and forward+backward; backward alone, of a graph that is kept, where it has a target.

    Compiled code and some peers overwrite what they keep: their backward runs once a graph.
    """
    found = passes(function, sample, bench.backward)
    has_target = any(key[0] == operation and key[2] == "backward" for key in targets.TARGETS)
    if bench.backward and has_target and variant.startswith(("ours", "eager")):
        found["backward"] = _Backward(function, sample)
    return found


class _Backward:
    """The gradients again and again, of one graph that is made when the first are asked for."""

    def __init__(self, function: Callable, sample: Sample):
        self.function, self.sample, self.output = function, sample, None

    def __call__(self) -> tuple[torch.Tensor, ...]:
        if self.output is None:
            self.output = first(self.function(*self.sample.args, **self.sample.kwargs))
            self.upstream = torch.ones_like(self.output)
        inputs = leaves(self.sample)
        return torch.autograd.grad(self.output, inputs, self.upstream, retain_graph=True)


def _measured(run: Callable, bench: Benchmark, sample: Sample, part: str) -> dict:
    try:
        sums = _sums(run())
        extra = memory.peak_memory(run) - result_bytes(run)
        found = timing.of(run, SECONDS)
    except Exception as error:  # of this pass alone: the others of this side are worth having
        if ends_the_process(error):
            raise
        return failure(error)
    return {**found, **_floors(bench, sample, part), "sums": sums, "extra_mib": extra / 2**20}


def _sums(outputs) -> list[float]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)]
    sizes = (t.detach().abs() if t.is_floating_point() else t for t in tensors)
    return [float(t.sum(dtype=torch.float64)) for t in sizes]


def _floors(bench: Benchmark, sample: Sample, part: str) -> dict[str, int]:
    """Bytes that memory must carry and operations of the products, of this pass."""
    forward = {"bytes": bench.bytes_moved, "flops": bench.flops}
    backward = {"bytes": bench.backward_bytes_moved, "flops": bench.backward_flops}
    chosen = {"forward": (forward,), "backward": (backward,)}.get(part, (forward, backward))
    found: dict[str, int] = {}
    for counts in chosen:
        for name, count in counts.items():
            if count is not None:
                found[name] = found.get(name, 0) + int(count(sample))
    return found
