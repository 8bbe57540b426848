"""tests/gpu/test_on_device.py: other streams, captured graphs, more elements than 32 bits count.

Each test function is an item, in a pytest of its own; each of its cases is a line
(device_lines.py), and cases that passed or failed before are not run again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

FILE = ROOT / "tests" / "gpu" / "test_on_device.py"
LAST = ("test_inductor_on_the_device", "test_a_device_that_is_not_current")


def items(only: list[str]) -> list[str]:
    """The functions of the file; those that compile longest or need two GPUs come last."""
    names = re.findall(r"^def (test_\w+)", FILE.read_text(), re.M)
    return sorted(names, key=lambda name: name in LAST)


def measure(item: str) -> Iterator[dict]:
    if importlib.util.find_spec("pytest") is None:
        yield {"status": "absent", "why": "pytest is not installed"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "device_lines"]
    command += ["-p", "no:cacheprovider", f"{FILE}::{item}"]
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    print(run.stdout, run.stderr, file=sys.stderr)
    lines = (run.stdout + run.stderr).strip().splitlines() or [""]
    ran = run.returncode in (0, 1, 5)  # passed, failed, nothing left to run
    yield {"status": "ran" if ran else "failed", "why": lines[-1][:400]}
