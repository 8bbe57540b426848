"""The table of machine code in the repository: within the limits, and that of these sources."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import apt_kernels

if apt_kernels.backends()["native"].startswith("absent"):
    pytest.skip("the calls are those of the C++ operators", allow_module_level=True)

import machine_code
import triton_offline as offline

RUN = "python tests/gpu/machine_code.py writes the table anew; look at the difference"
STREAMING = ("token_logprobs_fwd", "token_logprobs_bwd", "sequence_logps_fwd", "ema_update_fwd")
PRODUCTS = ("head_statistics", "grad_hidden", "grad_weight")


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return machine_code.read()


def test_nothing_spills_and_shared_memory_fits(table):
    for row in table:
        assert row["spilled"] == "0", row
        assert int(row["shared"]) <= offline.SHARED_LIMIT[row["target"]], row


def test_streaming_kernels_load_16_bytes(table):
    found = [r for r in table if r["kernel"] in STREAMING and r["call"] == "benchmark"]
    assert {r["kernel"] for r in found} == set(STREAMING)
    for row in found:
        assert int(row["load_16"]) > 0, row


def test_products_are_of_matrix_instructions(table):
    found = [r for r in table if r["kernel"] in PRODUCTS and r["call"] == "benchmark"]
    assert {r["kernel"] for r in found} == set(PRODUCTS)
    for row in found:
        assert int(row["matrix"]) > 0, row


def test_every_operation_with_triton_kernels_is_there_for_every_target(table):
    names = {op.name for op in machine_code.operations()}
    for target in offline.TARGETS:
        assert {r["operation"] for r in table if r["target"] == target} == names, RUN


def test_it_is_the_table_of_these_sources(table):
    if {r["triton"] for r in table} != {triton.__version__}:
        pytest.skip(f"the table is of Triton {table[0]['triton']}, this is {triton.__version__}")
    wanted = [r for r in table if r["target"] == "sm_80"]
    found = list(machine_code.rows("sm_80"))
    for row, want in zip(found, wanted, strict=False):
        assert row == want, RUN
    assert len(found) == len(wanted), RUN
