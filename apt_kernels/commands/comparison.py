"""Our functions beside eager PyTorch, torch.compile and installed peers, on the same tensors.

Accuracy is checked before time is taken, and all sides run alternately.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..calls import map_sample
from ..dispatch import backends
from ..registry import Benchmark, Op, Sample
from . import gpu_peers, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATIOS = {True: "median of ratios", False: "ratio of medians"}
TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (3e-2, 3e-2), torch.float16: (1e-2, 1e-2)}


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def leaves(sample: Sample) -> list[torch.Tensor]:
    values = (*sample.args, *sample.kwargs.values())
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


def passes(function: Callable, sample: Sample, backward: bool) -> dict[str, Callable]:
    """forward under no_grad, and forward + backward for an upstream gradient of ones."""

    def forward():
        with torch.no_grad():
            return function(*sample.args, **sample.kwargs)

    def both():
        output = first(function(*sample.args, **sample.kwargs))
        return torch.autograd.grad(output, leaves(sample), torch.ones_like(output))

    return {"forward": forward, "forward+backward": both} if backward else {"forward": forward}


def outcome(function: Callable, sample: Sample, backward: bool) -> list[torch.Tensor]:
    """What one side gives: the first result and the gradients, or what it wrote in place."""
    runs = passes(function, sample, backward)
    result = first(runs["forward"]())
    if result is None:
        tensors = (t for a in sample.args for t in (a if isinstance(a, list) else [a]))
        return [t for t in tensors if isinstance(t, torch.Tensor)]
    return [result, *(runs["forward+backward"]() if backward else ())]


def check(op: Op, variant: Callable, sample: Sample, dtype: torch.dtype, backward: bool) -> None:
    """The two sides must agree before either is timed."""
    rtol, atol = TOLERANCE[dtype]
    sides = (outcome(f, copied(sample), backward) for f in (op.function, variant))
    for a, b in zip(*sides, strict=True):
        a, b = a.float(), b.float()
        error = (a - b).abs().max() if a.numel() else 0.0
        bound = atol + rtol * (b.abs().max() if b.numel() else 0.0)
        assert error <= bound, f"{op.name}: differs by {error} (allowed {bound})"


def result_bytes(run: Callable) -> int:
    results = run()
    results = results if isinstance(results, tuple) else (results,)
    return sum(r.numel() * r.element_size() for r in results if isinstance(r, torch.Tensor))


def on_device(sample: Sample, device: str) -> Sample:
    """The same call with tensors on the device; the CPU's own are not copied."""
    return _mapped(sample, lambda t: t.to(device))


def copied(sample: Sample) -> Sample:
    """The same call with tensors of its own, where it writes in place."""
    return _mapped(sample, lambda t: t.clone())


def _mapped(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    return map_sample(sample, lambda t: change(t.detach()).requires_grad_(t.requires_grad))


def variants_of(op: Op, bench: Benchmark, device: str) -> dict[str, Callable]:
    """Our function first, then each of its other backends on a GPU, PyTorch and the peers."""
    variants = {"fused": op.function}
    if device == "cuda":
        available = backends()["operations"][op.name][device]
        variants |= {
            b: functools.partial(op.function, backend=b) for b in available if b != "reference"
        }
    variants["eager"] = bench.eager
    if bench.compiled:
        torch._dynamo.reset()
        variants["compiled"] = torch.compile(bench.eager)
    return variants | installed_peers(op, bench, device)


def installed_peers(op: Op, bench: Benchmark, device: str) -> dict[str, Callable]:
    found = gpu_peers.of(op.name)[0] if device == "cuda" else {}
    for peer in bench.peers:
        try:
            found |= peer()
        except ImportError as error:
            _tell_once(f"{op.name}: a peer is left out, {error}")
    return found


@functools.cache
def _tell_once(message: str) -> None:
    print(message, file=sys.stderr)


def compare(
    op: Op,
    bench: Benchmark,
    dtype: torch.dtype,
    seconds: float,
    device: str = DEVICE,
    against: Sequence[str] = (),
    sample: Sample | None = None,
) -> Iterator[dict]:
    """Rows of one shape: every pass, every side.

    Args:
        op: the operation.
        bench: its shape.
        dtype: of the tensors.
        seconds: time for each pass, for all sides together.
        device: "cpu" or "cuda".
        against: names of the sides beside ours; all where it is empty.
        sample: the call, if it is not the benchmark's own.
    """
    sample = on_device(bench.make(dtype) if sample is None else sample, device)
    variants = variants_of(op, bench, device)
    chosen = [v for v in variants if v == "fused" or not against or v in against]
    if bench.comparable:
        check(op, bench.eager, sample, dtype, bench.backward)
    for name in passes(op.function, sample, bench.backward):
        runs = {v: passes(variants[v], sample, bench.backward)[name] for v in chosen}
        floor = bench.floor if name == "forward" else bench.backward_floor
        if not against:
            runs |= {v: passes(f, sample, False)["forward"] for v, f in floor.items()}
        times = measure.alternate(runs, seconds)
        moved = _bytes_moved(bench, sample, name)
        for variant, run in runs.items():
            extra = measure.peak_memory(run) - result_bytes(run)
            yield {
                "operation": op.name,
                "shape": bench.name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": name,
                "variant": variant,
                **_figures(times[variant], times["fused"], moved),
                "extra_mib": f"{max(0, extra) / 2**20:.1f}",
            }


def _figures(times: list[float], fused: list[float], moved: int | None) -> dict[str, str]:
    low, middle, high = measure.quantiles(times)
    return {
        "ms": f"{middle:.4g}",
        "ms_p20": f"{low:.4g}",
        "ms_p80": f"{high:.4g}",
        "fused_speedup": f"{measure.ratio(times, fused):.3g}",
        "ratio": RATIOS[measure.paired(times, fused)],
        "gb_per_s": f"{moved / middle / 1e6:.3g}" if moved else "",
    }


def _bytes_moved(bench: Benchmark, sample: Sample, name: str) -> int | None:
    """What the memory must carry in this pass, if that is known."""
    moved = bench.bytes_moved(sample) if bench.bytes_moved else None
    if moved and name != "forward" and bench.backward_bytes_moved:
        moved += bench.backward_bytes_moved(sample)
    return moved


def machine(device: str = DEVICE) -> str:
    """The name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
