"""compute-sanitizer over the CUDA kernels in a program without PyTorch (driver.cpp).

PyTorch gives tensors parts of large allocations, in which memcheck sees no access beyond an end.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import cuda_build

CHECKS = ("memcheck", "racecheck")
SECONDS = 50


def items(only: list[str]) -> list[str]:
    return [f"{check}|{case}" for check in CHECKS for case in cuda_build.CASES]


def measure(item: str) -> Iterator[dict]:
    check, case = item.split("|")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"status": "absent", "why": "compute-sanitizer is not installed"}
        return
    cuda_build.wait_for(cuda_build.driver())
    command = [tool, "--tool", check, "--error-exitcode", "9", str(cuda_build.driver()), case]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    text = (run.stdout + run.stderr).strip()
    if run.returncode == 0:
        yield {"status": "passed", "why": text.splitlines()[-1][:200]}
    else:
        yield {"status": "failed", "why": f"status {run.returncode}: {text[:1500]}"}
