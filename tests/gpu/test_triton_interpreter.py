"""Runs the Triton kernels under the interpreter, in a process of its own.

TRITON_INTERPRET=1 must be set before the kernels are imported, and once it is set they cannot be
compiled: so not in this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = ("triton_kernel_tests.py", "triton_contrastive_tests.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tests", TESTS)
def test_kernels_under_the_interpreter(tests):
    environment = dict(os.environ, TRITON_INTERPRET="1")
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(tests)),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, f"\n{report}"
    assert " passed" in report and " failed" not in report and " skipped" not in report, report
