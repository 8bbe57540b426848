"""Checks of kernels built with a sanitizer, in processes in which such a library can be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .build import HERE, ROOT, build, compiler

_LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
SIGNS = {
    "address": ("AddressSanitizer", "runtime error:"),
    "thread": ("ThreadSanitizer: data race",),
}


@dataclass(frozen=True)
class Job:
    label: str
    checks: list[str] = field(default_factory=list)  # none: all
    patches: tuple[tuple[str, str, str], ...] = ()


def runtime(sanitizer: str) -> str | None:
    """The path of the sanitizer's library, None if the compiler has none."""
    command = [compiler(), f"-print-file-name={_LIBRARIES[sanitizer]}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def run_checks(sanitizer: str, jobs: list[Job], go_on: bool) -> subprocess.CompletedProcess:
    """Runs the jobs in one new process; stdout holds all it wrote, each job below its "== label".

    Args:
        sanitizer: "address" (with undefined behaviour) or "thread".
        jobs: what is run.
        go_on: after a report or a failed check; otherwise the first one ends the process.
    """
    for job in jobs:  # here: the compiler must not run under the sanitizer
        build(sanitizer, job.patches)
    halt = f"halt_on_error={int(not go_on)}"
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime(sanitizer)),
        # Python and PyTorch leak by design; only the kernels are instrumented
        "ASAN_OPTIONS": f"detect_leaks=0,{halt}",
        "UBSAN_OPTIONS": f"print_stacktrace=1,{halt}",
        "TSAN_OPTIONS": f"suppress_equal_addresses=0,{halt}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    order = {"sanitizer": sanitizer, "jobs": [asdict(j) for j in jobs], "go_on": go_on}
    command = [sys.executable, "-m", "gpu.cuda_emulation"]
    run = _run(command, environment, json.dumps(order))
    if "unexpected memory mapping" in run.stdout and shutil.which("setarch"):
        # TSan: the addresses of this system are too random
        run = _run(["setarch", "-R", *command], environment, json.dumps(order))
    return run


def _run(command: list[str], environment: dict[str, str], order: str):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, env=environment, input=order, text=True, **pipes)
