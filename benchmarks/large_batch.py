"""A contrastive batch whose similarities do not fit: info_nce of 65536 pairs in 4 GiB.

    python benchmarks/large_batch.py [--pairs N] [--width D] [--gib G]

Symmetric, float32, forward and backward, each side in a process of its own that may hold so much
memory and no more (RLIMIT_DATA). Writes benchmarks/results/large-batch-cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import time

import torch

from apt_kernels.registry import OPS
from run import ROOT, facts

FIELDS = ("operation", "shape", "limit_gib", "side", "outcome", "seconds", "peak_gib")
FACTS = ("machine", "threads", "torch", "commit", "date")


def child(side: str, pairs: int, width: int, gib: float) -> None:
    """Prints what became of one step: seconds, or the name of the error."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
    op = OPS["info_nce"]
    function = op.function if side == "fused" else op.benchmarks[0].eager
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(pairs, width, generator=generator).requires_grad_() for _ in "qk")
    start = time.perf_counter()
    try:
        result = function(query, key, temperature=0.07, symmetric=True)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        assert all(x.grad.isfinite().all() for x in (query, key))
        print("finished", time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print("out-of-memory", "")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=65536)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.pairs, options.width, options.gib)
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("pairs", "width", "gib")]
    target = ROOT / "benchmarks" / "results" / "large-batch-cpu.csv"
    rows = []
    for side in ("fused", "eager"):
        command = [sys.executable, __file__, *sizes, "--child", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (outcome, *seconds), (peak,) = (line.split() for line in output.splitlines())
        values = (
            "info_nce", f"symmetric {options.pairs} x {options.pairs}, D = {options.width}",
            options.gib, side, outcome, *(f"{float(s):.1f}" for s in seconds or ["nan"]),
            f"{float(peak):.2f}",
        )  # fmt: skip
        rows.append({**dict(zip(FIELDS, values, strict=True)), **facts()})
        print(rows[-1], flush=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *FACTS))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
