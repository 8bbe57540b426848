"""Kernels against eager PyTorch, torch.compile and installed peers, on the registry's shapes.

    python benchmarks/run.py [--only NAME ...] [--seconds S] [--output FOLDER]

Every comparison runs twice, each in a process of its own: with PyTorch as installed, and with
PyTorch's memory on huge pages (THP_MEM_ALLOC_ENABLE=1). Accuracy is checked before time is taken;
all sides run alternately on the same tensors; medians are reported. Writes a CSV with machine,
versions and commit, and two pictures. Rows are written as they are measured, and replace those of
the same operations in the file: a run of some operations keeps what is known of the others.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import apt_kernels
import gpu_peers
import measure
from apt_kernels.registry import OPS, Benchmark, Op, Sample

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"installed": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
FIELDS = (
    "operation", "shape", "dtype", "pass", "pages", "variant", "ms", "ms_p20", "ms_p80",
    "fused_speedup", "gb_per_s", "extra_mib", "machine", "threads", "torch", "commit", "date",
)  # fmt: skip
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
    return mapped(sample, lambda t: t.to(device))


def copied(sample: Sample) -> Sample:
    """The same call with tensors of its own, where it writes in place."""
    return mapped(sample, lambda t: t.clone())


def mapped(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    def move(value):
        if isinstance(value, (tuple, list)):
            return type(value)(move(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        return change(value.detach()).requires_grad_(value.requires_grad)

    kwargs = {name: move(value) for name, value in sample.kwargs.items()}
    return Sample(sample.name, tuple(move(v) for v in sample.args), kwargs)


def variants_of(op: Op, bench: Benchmark, device: str) -> dict[str, Callable]:
    """Our function first, then each of its other backends on a GPU, PyTorch and the peers."""
    variants = {"fused": op.function}
    if device == "cuda":
        available = apt_kernels.backends()["operations"][op.name][device]
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
            print(f"{op.name}: left out, {error}", file=sys.stderr)
    return found


def compare(
    op: Op, bench: Benchmark, dtype: torch.dtype, seconds: float, device: str = DEVICE
) -> Iterator[dict]:
    sample = on_device(bench.make(dtype), device)
    variants = variants_of(op, bench, device)
    if bench.comparable:
        check(op, bench.eager, sample, dtype, bench.backward)
    for name in passes(op.function, sample, bench.backward):
        runs = {v: passes(f, sample, bench.backward)[name] for v, f in variants.items()}
        floor = bench.floor if name == "forward" else bench.backward_floor
        runs |= {v: passes(f, sample, False)["forward"] for v, f in floor.items()}
        times = measure.alternate(runs, seconds)
        moved = bench.bytes_moved(sample) if bench.bytes_moved else None
        if moved and name != "forward":
            moved += bench.backward_bytes_moved(sample) if bench.backward_bytes_moved else 0
        for variant, run in runs.items():
            low, middle, high = measure.quantiles(times[variant])
            extra = measure.peak_memory(run) - result_bytes(run)
            yield {
                "operation": op.name,
                "shape": bench.name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": name,
                "variant": variant,
                "ms": f"{middle:.4g}",
                "ms_p20": f"{low:.4g}",
                "ms_p80": f"{high:.4g}",
                "fused_speedup": f"{measure.ratio(times[variant], times['fused']):.3g}",
                "gb_per_s": f"{moved / middle / 1e6:.3g}" if moved else "",
                "extra_mib": f"{max(0, extra) / 2**20:.1f}",
            }


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def facts() -> dict[str, str]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    commit = git("describe", "--always")
    if git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"):
        commit += "-dirty"
    return {
        "machine": machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def child(only: list[str], seconds: float, path: Path) -> None:
    """One setting, in this process; its rows go to the end of the file as they are measured."""
    known = {**facts(), "pages": os.environ["APT_BENCH_PAGES"]}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        for op in OPS.values():
            if only and op.name not in only:
                continue
            for bench in op.benchmarks:
                for dtype in bench.dtypes if DEVICE in bench.devices else ():
                    print(f"{op.name} {bench.name} {dtype}", file=sys.stderr, flush=True)
                    for row in compare(op, bench, dtype, seconds):
                        writer.writerow({**row, **known})
                        file.flush()


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict]) -> None:
    print(f"{'operation, shape, dtype, pass':70} {'variant':10} ms as installed / huge pages")
    keys = dict.fromkeys(
        (r["operation"], r["shape"], r["dtype"], r["pass"], r["variant"]) for r in rows
    )
    by_key = {
        (r["operation"], r["shape"], r["dtype"], r["pass"], r["variant"], r["pages"]): r
        for r in rows
    }
    for key in keys:
        cells = [by_key.get((*key, pages)) for pages in SETTINGS]
        text = " / ".join(
            f"{c['ms']} ms ({c['fused_speedup']} x fused, {c['extra_mib']} MiB)" if c else "-"
            for c in cells
        )
        print(f"{' '.join(key[:4]):70} {key[4]:10} {text}")


def main() -> None:
    import plots  # and matplotlib, which not every machine with a GPU has

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one comparison")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.only) - set(OPS)
    if unknown:
        parser.error(f"--only: expected names among {sorted(OPS)}, got {sorted(unknown)}")
    if options.child:
        child(options.only, options.seconds, options.child)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"kernels-{DEVICE}.csv"
    selected = set(options.only or OPS)
    write_rows(target, [r for r in read_rows(target) if r["operation"] not in selected])
    for pages, settings in SETTINGS.items():
        command = [sys.executable, __file__, "--child", str(target), "--seconds"]
        command += [str(options.seconds), "--only", *options.only]
        environment = {**os.environ, **settings, "APT_BENCH_PAGES": pages}
        subprocess.run(command, env=environment, check=True)
    order = list(OPS)
    rows = sorted(read_rows(target), key=lambda r: order.index(r["operation"]))
    write_rows(target, rows)
    show([row for row in rows if row["operation"] in selected])
    plots.draw(rows, target.with_suffix(""))
    print(f"wrote {target} and {target.stem}-speed.png, {target.stem}-memory.png")


if __name__ == "__main__":
    main()
