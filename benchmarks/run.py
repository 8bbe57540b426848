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
import os
import subprocess
import sys
from pathlib import Path

import torch

from apt_kernels.commands.comparison import DEVICE, compare, machine
from apt_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"installed": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
FIELDS = (
    "operation", "shape", "dtype", "pass", "pages", "variant", "ms", "ms_p20", "ms_p80",
    "fused_speedup", "gb_per_s", "extra_mib", "machine", "threads", "torch", "commit", "date",
)  # fmt: skip


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
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
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
