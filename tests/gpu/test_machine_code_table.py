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
import side_by_side
import triton_offline as offline

RUN = "python tests/gpu/machine_code.py writes the table anew; look at the difference"
STREAMING = ("token_logprobs_fwd", "token_logprobs_bwd", "sequence_logps_fwd", "ema_update_fwd")
# Bytes a thread that an older Triton spills, and the one that is here does not (docs/gpu.md).
SPILLED = {
    ("3.5.1", "sm_100", "linear_cross_entropy", "head_statistics"): 8,
    ("3.6.0", "sm_100", "linear_cross_entropy", "head_statistics"): 8,
    ("3.5.1", "sm_100", "linear_dpo_loss", "grad_logits_tile"): 8,
    ("3.6.0", "sm_80", "linear_policy_loss", "policy_loss_fwd"): 8,
}
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


@pytest.mark.parametrize("target", machine_code.NVIDIA)
@pytest.mark.parametrize("version", side_by_side.TRITONS)
def test_every_launcher_compiles_with_an_older_triton(version, target):
    """The Tritons of PyTorch 2.9 to 2.12, which most people have."""
    try:
        side_by_side.triton(version)
    except side_by_side.Unavailable as why:
        pytest.skip(f"Triton {version} is not to be had, nothing is compiled with it: {why}")
    table = [r for r in machine_code.read(machine_code.table_of(version)) if r["target"] == target]
    found = machine_code.with_older(version, target)
    assert {row["triton"] for row in found} == {version}
    assert {r["operation"] for r in found} == {op.name for op in machine_code.operations()}
    for row in found:
        place = (version, target, row["operation"], row["kernel"])
        assert int(row["spilled"]) == SPILLED.get(place, 0), row
        assert int(row["shared"]) <= offline.SHARED_LIMIT[target], row
    assert found == table, RUN


@pytest.mark.parametrize("version", side_by_side.TRITONS)
def test_losses_without_references_compile_with_an_older_triton(version):
    """Arguments that are None are taken apart by other rules there."""
    try:
        side_by_side.triton(version)
    except side_by_side.Unavailable as why:
        pytest.skip(f"Triton {version} is not to be had, nothing is compiled with it: {why}")
    run = side_by_side.python(version, "-c", WITHOUT_REFERENCES)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["0"] * 4


WITHOUT_REFERENCES = """
import torch
import triton_offline as offline
import apt_kernels.triton as kernels
x = torch.zeros(40)
found = []
for loss_type in (11, 12):
    options = (None, None, loss_type, 1, 0.1, 0.1, 0.5, 0.5)
    found += offline.launches(kernels.dpo_loss_fwd, x, x, *options)
for margins in (None, x):
    found += offline.launches(kernels.bradley_terry_loss_fwd, x, x, margins, 0.0, 0.1, 0)
print(*(offline.compiled(launch, "sm_90").spills for launch in found))
"""


def test_it_is_the_table_of_these_sources(table):
    if {r["triton"] for r in table} != {triton.__version__}:
        pytest.skip(f"the table is of Triton {table[0]['triton']}, this is {triton.__version__}")
    wanted = [r for r in table if r["target"] == "sm_80"]
    found = list(machine_code.rows("sm_80"))
    for row, want in zip(found, wanted, strict=False):
        assert row == want, RUN
    assert len(found) == len(wanted), RUN
