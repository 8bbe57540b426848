"""Hardware counters of the kernels of three calls, read by Nsight Compute with the clocks as found.

python counters.py ITEM        the call itself, inside the profiler
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from places import device

ITEMS = (
    "token_logprobs|8192 x 151936",
    "linear_token_logprobs|8192 x 4096 x 151936",
    "nt_xent|2 x 32768 views, D = 256",
)
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}
MOST_KERNELS = 8  # of one call: the head starts dozens that are alike
SECONDS = 50


def items(only: list[str]) -> list[str]:
    return [item for item in ITEMS if not only or item.split("|")[0] in only]


def measure(item: str) -> Iterator[dict]:
    tool = shutil.which("ncu")
    if tool is None:
        yield {"status": "absent", "why": "ncu is not installed"}
        return
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--launch-count", str(MOST_KERNELS)]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, item]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    found = list(parsed(run.stdout))
    yield from found
    if not found:
        lines = (run.stdout + run.stderr).strip().splitlines()
        yield {
            "status": "failed",
            "why": f"status {run.returncode}: {' / '.join(lines[-3:])[:400]}",
        }


def parsed(text: str) -> Iterator[dict]:
    """Kernels and their metrics, of the table that ncu prints behind its messages."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if not row.get("Kernel Name"):  # the line of units
            continue
        values = {name: row[metric] for metric, name in METRICS.items() if row.get(metric)}
        yield {"status": "measured", "kernel": row["Kernel Name"][:120], **values}


def profiled(item: str) -> None:
    """One call forward and backward, after one that compiles, between the profiler's marks."""
    import torch

    import calling
    import targets
    from apt_kernels.commands.comparison import passes

    operation, shape = item.split("|")
    bench = targets.benchmark(operation, shape)
    sample = calling.sample_of(bench, targets.dtype_of(operation))
    function = calling.ours(operation, calling.backends(operation)[0])
    run = list(passes(function, sample, bench.backward).values())[-1]
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    sys.path[:0] = [str(p) for p in (HERE.parent, HERE.parents[1], HERE.parents[1] / "tests")]
    assert device() == "cuda"
    profiled(sys.argv[1])
