"""A kernel belongs to an operation of the registry, which has tests and a benchmark row."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from apt_kernels import dispatch
from apt_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("logprobs", "preference", "policy", "contrastive", "masking")
SHARED = {kernel for op in OPS.values() for kernel in op.kernels}


def _sources(layer: str, suffix: str) -> list:
    files = sorted(f for family in FAMILIES for f in (ROOT / layer / family).glob(f"*{suffix}"))
    return [pytest.param(f, id=str(f.relative_to(ROOT))) for f in files]


@pytest.mark.parametrize("path", _sources("csrc/bindings", ".cpp"))
def test_bound_kernels_are_those_of_an_operation(path):
    bound = set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
    assert bound, "a binding without a kernel"
    assert bound <= SHARED, f"no operation of the registry has {bound - SHARED}"


def test_cuda_kernels_are_those_of_an_operation():
    bound = set(re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc/bindings/cuda.cpp").read_text()))
    assert bound and bound <= SHARED


def test_triton_launchers_are_those_of_an_operation():
    if dispatch._triton is None:
        pytest.skip(f"Triton is not installed: {dispatch._triton_error}")
    launchers = set(dispatch._triton.LAUNCHERS)
    assert launchers <= SHARED, f"no operation of the registry has {launchers - SHARED}"
    for path in (
        f for family in FAMILIES for f in (ROOT / "apt_kernels/triton").glob(f"{family}/*.py")
    ):
        made = set(re.findall(r"^def (\w+_(?:fwd|bwd))\(", path.read_text(), re.M))
        assert made <= launchers, f"{path.name}: LAUNCHERS does not name {made - launchers}"


def test_every_schema_is_a_kernel_of_an_operation():
    assert set(dispatch.SCHEMAS) == SHARED


@pytest.mark.parametrize("name", OPS)
def test_every_operation_has_samples_wrong_calls_and_a_benchmark_row(name):
    op = OPS[name]
    assert op.kernels and next(iter(op.samples(op.dtypes[0])), None) is not None
    assert next(iter(op.rejected()), None) is not None
    assert op.benchmarks and op.source and op.summary
    with (ROOT / "benchmarks/results/kernels-cpu.csv").open(newline="") as file:
        measured = {row["operation"] for row in csv.DictReader(file)}
    assert name in measured, "make bench writes its rows"
