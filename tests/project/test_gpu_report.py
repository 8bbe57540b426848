"""`make gpu-report` without a GPU: what it says, and its logic on the CPU path."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert "no GPU that PyTorch can use" in done.stderr and "make bench" in done.stderr


def test_unknown_operation():
    done = run("--only", "nonesuch")
    assert done.returncode == 2 and "expected names among" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the report of a GPU is its own test")
def test_report_on_the_cpu_path(tmp_path):
    done = run(
        "--on-cpu", "--only", "bradley_terry_loss", "--seconds", "0.01", "--output", str(tmp_path),
        "--skip", "tests", "sanitizer",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = next(tmp_path.glob("*.md")).read_text()
    for heading in ("# Report of ", "## tuning", "## kernels", "| as in the sources |"):
        assert heading in report
    assert "## sanitizer" not in report
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["variant"] for r in rows} == {"fused", "eager", "compiled"}
    assert {r["pass"] for r in rows} == {"forward", "forward+backward"}
    assert all(float(r["ms"]) > 0 for r in rows)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_step_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import argparse

    import gpu_report

    def broken(options):
        yield "first result"
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(
        gpu_report, "STEPS", {"broken": broken, "after": lambda options: iter(["still here"])}
    )
    options = argparse.Namespace(output=tmp_path, name="x", skip=[], only=[], seconds=0.0)
    assert gpu_report.report(options) == ["broken"]
    text = (tmp_path / "x.md").read_text()
    assert "first result" in text and "fell off the bus" in text and "still here" in text


def test_backend_preferences_follow_the_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    rows = [
        {"operation": "a", "variant": v, "ms": ms}
        for v, ms in (("triton", "2"), ("native", "0.5"), ("native", "1"), ("eager", "9"))
    ]
    rows += [{"operation": "b", "variant": "triton", "ms": "1"}]
    (text,) = gpu_report._preferences(rows)
    assert '("native", "triton", "reference")' in text and "`a`" in text
