"""The registry's shapes under pytest-benchmark: `pytest benchmarks/`.

Groups put the fused kernel beside eager PyTorch; `benchmarks/run.py` alternates the sides, compares
with torch.compile and peers as well, and measures memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from apt_kernels.commands.comparison import DEVICE, check, on_device, passes
from apt_kernels.registry import OPS


def _cases():
    for op in OPS.values():
        for bench in op.benchmarks:
            for dtype in bench.dtypes if DEVICE in bench.devices else ():
                for side in ("fused", "eager"):
                    name = f"{op.name}-{bench.name}-{str(dtype).removeprefix('torch.')}-{side}"
                    yield pytest.param(op, bench, dtype, side, id=name)


@pytest.mark.parametrize("op, bench, dtype, side", list(_cases()))
def test_kernel(benchmark, op, bench, dtype, side):
    sample = on_device(bench.make(dtype), DEVICE)
    if side == "fused" and bench.comparable:
        check(op, bench.eager, sample, dtype, bench.backward)
    function = op.function if side == "fused" else bench.eager
    name, run = list(passes(function, sample, bench.backward).items())[-1]
    benchmark.group = f"{op.name} {bench.name} {str(dtype).removeprefix('torch.')} {name}"
    benchmark(run)
