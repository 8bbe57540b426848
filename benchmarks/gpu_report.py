"""Everything that only a GPU can tell, in one report: `make gpu-report`.

    python benchmarks/gpu_report.py [--only NAME ...] [--seconds S] [--skip STEP ...]

Steps, each written to the report as soon as it ends (a later one that fails loses nothing):
  tests      the whole registry and tests/gpu/test_on_device.py on the device
  sanitizer  compute-sanitizer's memcheck and racecheck over the CUDA C++ kernels, where installed
  tuning     blocks and warps of the Triton kernels
  kernels    every operation against eager, torch.compile and installed peers, each backend
Writes gpu-<name>.md, gpu-<name>.csv and two pictures under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import gpu_peers
import plots
import tuning
from apt_kernels.registry import OPS
from run import DEVICE, FIELDS, ROOT, compare, facts

NO_GPU = """gpu-report: no GPU that PyTorch can use ({reason}).
It needs an NVIDIA GPU, or an AMD one for the Triton kernels. Everything that can be checked without
one is checked by `make test`; `make bench` measures the CPU."""
SANITIZED = "values_and_gradients and cuda-native and float32"


def why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    return "no device is visible to the driver" if shutil.which("nvidia-smi") else "no driver"


def _pytest(*arguments: str, before: tuple[str, ...] = ()) -> tuple[bool, str]:
    """(whether all passed and something ran, the last lines)."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    return run.returncode == 0, "\n".join(lines[-1:] if run.returncode == 0 else lines[-40:])


def tests(options: argparse.Namespace) -> Iterator[str]:
    names = " or ".join(options.only) or "cuda"
    for title, arguments in (
        ("registry", ["tests/ops/test_ops.py", "-k", f"({names}) and {DEVICE}"]),
        ("device", ["tests/gpu/test_on_device.py"]),
        ("offline and emulated", ["tests/gpu", "--ignore=tests/gpu/test_on_device.py"]),
    ):
        passed, text = _pytest(*arguments)
        yield f"**{title}: {'passed' if passed else 'FAILED'}**\n\n```\n{text}\n```"


def sanitizer(options: argparse.Namespace) -> Iterator[str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "compute-sanitizer is not installed: not run."
        return
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        before = (tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all")
        passed, text = _pytest("tests/ops/test_ops.py", "-k", SANITIZED, before=before)
        yield f"**{check}: {'nothing found' if passed else 'FAILED'}**\n\n```\n{text}\n```"


def tune(options: argparse.Namespace) -> Iterator[str]:
    chosen = [s for s in tuning.SETTINGS if not options.only or s.operation in options.only]
    for setting in chosen:
        yield tuning.table(setting, DEVICE, options.seconds)


def kernels(options: argparse.Namespace) -> Iterator[str]:
    rows = []
    for op in OPS.values():
        if options.only and op.name not in options.only:
            continue
        missing = gpu_peers.of(op.name)[1]
        for bench in op.benchmarks:
            for dtype in bench.dtypes if DEVICE in bench.devices else ():
                try:
                    found = list(compare(op, bench, dtype, options.seconds))
                except (RuntimeError, AssertionError) as error:  # one shape too large, one peer off
                    yield f"`{op.name}` {bench.name} {dtype}: {type(error).__name__}: {error}"
                    continue
                rows += [{**row, "pages": "installed", **facts()} for row in found]
        if missing:
            yield f"`{op.name}`: not installed: {', '.join(missing)}."
    if not rows:
        yield "no benchmark ran."
        return
    stem = options.output / options.name
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plots.draw(rows, stem)
    yield _table(rows)
    yield from _preferences(rows)
    yield f"![speed]({stem.name}-speed.png) ![memory]({stem.name}-memory.png)"


def _table(rows: list[dict]) -> str:
    lines = [
        "| operation | shape | dtype | pass | variant | ms (20 %–80 %) | × ours | GB/s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        quantiles = f"{r['ms']} ({r['ms_p20']}–{r['ms_p80']})"
        cells = (r["operation"], r["shape"], r["dtype"], r["pass"], r["variant"], quantiles)
        cells += (r["fused_speedup"], r["gb_per_s"] or "–", r["extra_mib"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _preferences(rows: list[dict]) -> Iterator[str]:
    """What `PREFERENCE_OF_OPERATION` of apt_kernels/dispatch.py should say after this run."""
    total: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["variant"] in ("triton", "native"):
            sums = total.setdefault(row["operation"], {})
            sums[row["variant"]] = sums.get(row["variant"], 0.0) + float(row["ms"])
    for operation, sums in total.items():
        if len(sums) == 2:
            first, second = sorted(sums, key=sums.get)
            yield (
                f"`{operation}`: {first} first ({sums[first]:.4g} ms, {second} "
                f'{sums[second]:.4g} ms): `("{operation}", "{DEVICE}"): '
                f'("{first}", "{second}", "reference")`'
            )


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "tests": tests,
    "sanitizer": sanitizer,
    "tuning": tune,
    "kernels": kernels,
}


def report(options: argparse.Namespace) -> list[str]:
    """Writes the report step by step; returns the names of the steps that failed."""
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    with (options.output / f"{options.name}.md").open("w") as file:

        def write(text: str) -> None:
            file.write(text + "\n\n")
            file.flush()
            print(text, flush=True)

        write(f"# Report of {facts()['machine']}")
        write("\n".join(f"- {name}: {value}" for name, value in facts().items()))
        for name, step in STEPS.items():
            if name in options.skip:
                continue
            write(f"## {name}")
            try:
                for text in step(options):
                    failed += [name] if "FAILED" in text else []
                    write(text)
            except Exception:  # the steps after it are worth having
                failed.append(name)
                write(f"FAILED\n\n```\n{traceback.format_exc()}```")
    return sorted(set(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for one comparison")
    parser.add_argument("--skip", nargs="*", default=[], choices=STEPS, help="steps to leave out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--on-cpu", action="store_true", help="try the report itself, without a GPU"
    )
    options = parser.parse_args()
    unknown = set(options.only) - set(OPS)
    if unknown:
        parser.error(f"--only: expected names among {sorted(OPS)}, got {sorted(unknown)}")
    if DEVICE == "cpu" and not options.on_cpu:
        print(NO_GPU.format(reason=why_no_gpu()), file=sys.stderr)
        return 2
    machine = re.sub(r"\W+", "-", facts()["machine"].lower()).strip("-")
    options.name = f"gpu-{machine}" if DEVICE == "cuda" else f"cpu-{machine}"
    failed = report(options)
    print(f"wrote {options.output / options.name}.md")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parent))
    sys.exit(main())
