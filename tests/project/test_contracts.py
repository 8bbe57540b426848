"""The borders between layers: call tuples and launchers have the fields of a kernel's schema."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import apt_kernels
from apt_kernels import dispatch

ROOT = Path(apt_kernels.__file__).resolve().parent


def _fields(kernel: str) -> list[str]:
    """The names of a schema's arguments, in order."""
    arguments = re.search(r"\((.*)\) ->", dispatch.SCHEMAS[kernel]).group(1)
    return [a.partition("=")[0].split()[-1] for a in re.split(r",\s*", arguments)]


def _tuples() -> dict[str, type]:
    """The classes `XCall` of the operations, and `XBackwardCall`, by kernel without underscores."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("apt_kernels.ops."):
            for title, value in vars(module).items():
                if title.endswith("Call") and hasattr(value, "_fields"):
                    stem = title.removesuffix("Call")
                    kind = "bwd" if stem.endswith("Backward") else "fwd"
                    found[stem.removesuffix("Backward").lower() + kind] = value
    return found


def _launcher(kernel: str) -> list[str]:
    """The parameters of a Triton launcher, read from its source: without a GPU it need not load."""
    path = ROOT / "triton" / (dispatch._triton.LAUNCHERS[kernel].replace(".", "/") + ".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == kernel:
            return [a.arg for a in node.args.args]
    raise AssertionError(f"{path}: no function {kernel}")


@pytest.mark.parametrize("kernel", sorted(dispatch.SCHEMAS))
def test_the_tuple_of_a_call_has_the_fields_of_the_schema(kernel):
    call = _tuples().get(kernel.replace("_", ""))
    assert call is not None, "no class XCall (forward) or XBackwardCall with these fields"
    assert list(call._fields) == _fields(kernel)


@pytest.mark.parametrize("kernel", sorted(dispatch.SCHEMAS))
def test_a_triton_launcher_has_the_parameters_of_the_schema(kernel):
    if dispatch._triton is None:
        pytest.skip(f"Triton is not installed: {dispatch._triton_error}")
    assert _launcher(kernel) == _fields(kernel)


def test_no_border_is_crossed_by_position():
    """Neither slices of arguments nor rows of them: a call is taken apart by name."""
    sliced = re.compile(r"\b(inputs|rest|options|arguments|fields|call)\[[-\d:]")
    for path in sorted((ROOT / "ops").rglob("*.py")):
        assert not sliced.search(path.read_text()), path


def test_reading_the_schema_sees_defaults_and_optionals():
    dispatch.SCHEMAS["x_fwd"] = "x_fwd(Tensor? a, SymInt b, bool c=False) -> (Tensor, Tensor)"
    try:
        assert _fields("x_fwd") == ["a", "b", "c"]
    finally:
        del dispatch.SCHEMAS["x_fwd"]
    assert inspect.isclass(_tuples()["dpolossfwd"])
