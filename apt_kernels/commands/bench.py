"""Measure time and memory beside eager and compiled PyTorch and installed peers."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__
from ..registry import OPS, Benchmark, Op, Sample
from . import charts, comparison, page, scaling, tables
from .progress import Progress

DTYPES = ("float32", "bfloat16", "float16", "int64")
FILES = ("results.csv", "results.html", "results.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", nargs="+", default=[], metavar="NAME", help="only these operations")
    add("--shape", default="", metavar="TEXT", help="only shapes with this text in their name")
    add("--dtype", choices=DTYPES, help="only this dtype")
    add(
        "--against", nargs="+", default=[], metavar="SIDE",
        help="only these sides: eager, compiled, or a peer by its name (default: all)",
    )  # fmt: skip
    add("--threads", nargs="+", type=int, default=[], metavar="N", help="numbers of CPU threads")
    add("--scale", choices=("N", "V", "D", "B"), help="also measure parts of this axis")
    add("--seconds", type=float, default=2.0, help="time for one pass of one shape (default: 2)")
    add("--output", type=Path, metavar="FOLDER", help="default: apt-kernels-bench/DATE-TIME")
    add("--compare", type=Path, metavar="CSV", help="results.csv of an earlier run")
    add("--overwrite", action="store_true", help="replace results that are in FOLDER")


class Step(NamedTuple):
    """One shape to measure. `sample` is None for the benchmark's own; else `size` of the axis."""

    op: Op
    bench: Benchmark
    dtype: torch.dtype
    threads: int
    size: int | None = None
    sample: Sample | None = None


def run(options: argparse.Namespace) -> int:
    steps = list(planned(options))
    if not steps:
        raise ValueError("--op, --shape, --dtype: expected a benchmark, got none that fits them")
    folder = options.output or _new_folder()
    refuse_to_replace(folder, options.overwrite)
    earlier = tables.read(options.compare) if options.compare else []
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    progress = Progress(len(steps), "shapes")
    threads = torch.get_num_threads()
    try:
        for done, step in enumerate(steps):
            progress.show(done, f"{step.op.name} {step.bench.name}")
            rows += measured(step, options)
            tables.write(folder / "results.csv", rows)
    finally:
        torch.set_num_threads(threads)
        progress.clear()
    unknown = set(options.against) - {row["variant"] for row in rows}
    if unknown:
        print(f"--against: not installed or not known for these operations: {sorted(unknown)}")
    print("\n".join([*tables.results_table(rows), "", tables.legend(rows)]))
    if earlier:
        print(
            "\n".join(["", f"against {options.compare}", *tables.comparison_table(rows, earlier)])
        )
    page.write(folder / "results.html", rows, earlier)
    drawn = charts.draw_png(folder / "results.png", rows)
    written = [f for f in FILES if drawn or f != "results.png"]
    print(f"wrote {', '.join(str(folder / f) for f in written)}")
    if not drawn:
        print("left out results.png: matplotlib is not installed (pip install matplotlib)")
    return 0


def planned(options: argparse.Namespace) -> Iterator[Step]:
    """Every shape that the options choose."""
    unknown = sorted(set(options.op) - set(OPS))
    if unknown:
        raise ValueError(f"--op: expected names among {sorted(OPS)}, got {unknown}")
    for threads in options.threads or [torch.get_num_threads()]:
        if threads < 1:
            raise ValueError(f"--threads: expected numbers of at least 1, got {threads}")
        for name in options.op or OPS:
            for bench in OPS[name].benchmarks:
                if comparison.DEVICE in bench.devices and options.shape in bench.name:
                    for dtype in bench.dtypes:
                        if options.dtype in (None, str(dtype).removeprefix("torch.")):
                            yield from _sizes(Step(OPS[name], bench, dtype, threads), options)


def _sizes(step: Step, options: argparse.Namespace) -> Iterator[Step]:
    if options.scale is None or (not options.op and options.scale not in _axes(step.op)):
        yield step
        return
    whole = step.bench.make(step.dtype)
    for size, sample in scaling.sizes(step.op, whole, options.scale):
        yield step._replace(size=size, sample=sample)


def _axes(op: Op) -> dict[str, tuple[str, int]]:
    return scaling.AXES.get(op.name, {})


def measured(step: Step, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of one shape, with what is known of the machine."""
    torch.set_num_threads(step.threads)
    known = {
        "threads": str(step.threads),
        "axis": options.scale if step.size else "",
        "size": str(step.size or ""),
        "machine": comparison.machine(),
        "torch": torch.__version__,
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }
    for row in comparison.compare(
        step.op, step.bench, step.dtype, options.seconds,
        against=options.against, sample=step.sample,
    ):  # fmt: skip
        yield {**row, **known}


def _new_folder() -> Path:
    return Path("apt-kernels-bench") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")


def refuse_to_replace(folder: Path, overwrite: bool) -> None:
    """Results that are there already are replaced only where that is asked for."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {folder}")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"--output: expected a folder without results, got {folder} with {', '.join(there)}; "
            "--overwrite replaces them"
        )
