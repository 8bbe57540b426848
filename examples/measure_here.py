"""Measure an operation beside plain PyTorch on this machine, from Python."""

import tempfile
from pathlib import Path

from apt_kernels.commands import tables
from apt_kernels.commands.main import main

with tempfile.TemporaryDirectory() as folder:
    arguments = ["--op", "gae", "--shape", "4096 x 8", "--against", "eager", "--seconds", "0.1"]
    assert main(["bench", *arguments, "--output", folder]) == 0
    rows = tables.read(Path(folder) / "results.csv")
times = {row["variant"]: float(row["ms"]) for row in rows}
print(f"gae takes {times['fused']:.3g} ms, plain PyTorch {times['eager']:.3g} ms")
