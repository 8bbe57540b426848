"""The integers of options are the same in Python, in C++ and in Triton."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from apt_kernels import codes, dispatch

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "csrc/include/apt/codes.h").read_text()
ENUMS = {
    "Reduction": codes.REDUCTIONS,
    "DpoLossType": codes.DPO_LOSS_TYPES,
    "Aggregation": codes.AGGREGATIONS,
    "PolicyLossType": codes.POLICY_LOSS_TYPES,
    "RatioLevel": codes.RATIO_LEVELS,
    "KlEstimator": codes.KL_ESTIMATORS,
    "GroupAdvantageKind": codes.GROUP_ADVANTAGE_KINDS,
}


def enumerators(name: str) -> dict[str, int]:
    (body,) = re.findall(rf"enum class {name} : int {{(.*?)}}", HEADER, re.S)
    return {k: int(v) for k, v in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.parametrize("name", ENUMS)
def test_the_header_has_the_integers_of_python(name):
    assert enumerators(name) == ENUMS[name]


def test_every_enum_of_the_header_is_compared():
    assert set(re.findall(r"enum class (\w+)", HEADER)) == set(ENUMS)
    tables = [v for k, v in vars(codes).items() if k.isupper()]
    assert all(any(table is known for known in ENUMS.values()) for table in tables)


def test_triton_s_loss_types_have_the_integers_of_python():
    if dispatch._triton is None:
        pytest.skip(f"Triton is not installed: {dispatch._triton_error}")
    kernel = importlib.import_module("apt_kernels.triton.preference.dpo_loss")
    for name, code in codes.DPO_LOSS_TYPES.items():
        assert getattr(kernel, name.upper()).value == code
