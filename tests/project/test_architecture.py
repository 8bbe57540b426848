"""Who may touch what: the layers, read from the imports and includes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import apt_kernels
from apt_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "apt_kernels"


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def _ours(path: Path, prefix: str) -> list[str]:
    return sorted(name for name in imports(path) if name.split(".")[0] == prefix)


def _files(*patterns: str) -> list:
    files = sorted(f for pattern in patterns for f in ROOT.glob(pattern))
    return [pytest.param(f, id=str(f.relative_to(ROOT))) for f in files]


@pytest.mark.parametrize("path", _files("apt_kernels/reference/**/*.py"))
def test_reference_imports_torch_only(path):
    foreign = {n.split(".")[0] for n in imports(path)} - {
        "torch", "math", "__future__", "collections", "typing", "apt_kernels", "functools",
    }  # fmt: skip
    assert not foreign
    assert all(n.startswith("apt_kernels.reference") for n in _ours(path, "apt_kernels"))


@pytest.mark.parametrize("path", _files("apt_kernels/triton/**/*.py"))
def test_triton_kernels_know_neither_operations_nor_dispatch(path):
    assert all(n.startswith("apt_kernels.triton") for n in _ours(path, "apt_kernels"))
    assert not any(n.startswith("torch.autograd") for n in imports(path))


@pytest.mark.parametrize("path", _files("apt_kernels/ops/**/*.py"))
def test_operations_know_checks_dispatch_and_reference_only(path):
    """Composite operations may call the public functions of others."""
    for name in _ours(path, "apt_kernels"):
        assert not name.startswith(("apt_kernels.registry", "apt_kernels.triton")), name


@pytest.mark.parametrize("path", _files("apt_kernels/**/*.py"))
def test_kernels_never_import_the_trainers(path):
    assert not _ours(path, "apt_model")


@pytest.mark.parametrize("path", _files("python/apt_model/**/*.py"))
def test_trainers_use_public_names_and_hold_no_formula(path):
    public = {*apt_kernels.__all__, "integrations"}
    for name in _ours(path, "apt_kernels"):
        parts = name.split(".")
        allowed = len(parts) == 1 or parts[1] in public
        assert allowed, f"{name} is not a public name of apt_kernels"
    text = path.read_text()
    assert "torch.ops.apt" not in text
    for formula in ("log_softmax", "logsigmoid", "logsumexp", "torch.exp(", "torch.log(", ".exp()"):
        assert formula not in text, f"{formula}: formulas live in apt_kernels"


@pytest.mark.parametrize(
    "path", _files("csrc/cuda/**/*.cu*", "csrc/include/**/*.h", "csrc/cpu/**/*.*")
)
def test_kernels_include_no_torch(path):
    included = re.findall(r'#include [<"]([^>"]+)', path.read_text())
    torch_headers = [h for h in included if h.startswith(("torch/", "ATen/", "c10/", "pybind11/"))]
    door = "parallel.cpp"  # to PyTorch's threads
    assert bool(torch_headers) == (path.name == door), torch_headers


def test_every_operation_has_a_file_of_its_name_in_its_layers():
    for name in OPS:
        assert len(list((KERNELS / "ops").glob(f"*/{name}.py"))) == 1, name
        assert len(list((KERNELS / "registry").glob(f"*/{name}.py"))) == 1, name


def test_public_functions_are_exported_sorted_and_in_the_registry():
    assert list(apt_kernels.__all__) == sorted(apt_kernels.__all__)
    for name, op in OPS.items():
        assert getattr(apt_kernels, name) is op.function


FAMILIES = ("logprobs", "preference", "policy", "contrastive", "masking")
SHARED = ("common", "head")
# The references are files: those of a family with another name, and those that families share.
OF_REFERENCE = {
    "advantages": "policy", "value": "policy", "bookkeeping": "contrastive", "numerics": "common",
}  # fmt: skip


def _family(layer: str, below: tuple[str, ...]) -> str | None:
    """The family or shared folder that a path or a module below a layer belongs to."""
    stem = below[0].removesuffix(".py") if below else ""
    if layer.endswith("reference"):
        stem = OF_REFERENCE.get(stem, stem)
    return stem if stem in (*FAMILIES, *SHARED) else None


def _other_families(path: Path, layer: str, used: list[tuple[str, ...]]) -> list[str]:
    """What of `used`, the parts of modules or headers below the layer, is no business of `path`."""
    own = _family(layer, path.relative_to(ROOT / layer).parts)
    found = ((_family(layer, below), "/".join(below)) for below in used)
    return [name for family, name in found if family not in (None, own, *SHARED)]


def _in_families(layer: str, *suffixes: str) -> list:
    pick = [p for p in _files(*(f"{layer}/**/*{s}" for s in suffixes))]
    below = ((p, p.values[0].relative_to(ROOT / layer).parts) for p in pick)
    return [pytest.param(layer, *p.values, id=p.id) for p, parts in below if _family(layer, parts)]


@pytest.mark.parametrize(
    "layer, path",
    [
        p
        for layer in ("ops", "triton", "reference", "registry")
        for p in _in_families(f"apt_kernels/{layer}", ".py")
    ],
)
def test_a_family_imports_itself_and_what_is_shared(layer, path):
    prefix = layer.replace("/", ".") + "."
    used = [tuple(n.removeprefix(prefix).split(".")) for n in imports(path) if n.startswith(prefix)]
    assert not _other_families(path, layer, used)
    if layer.endswith("registry"):  # a sample belongs to the operation of its own family
        prefix = "apt_kernels.ops."
        used = [
            tuple(n.removeprefix(prefix).split(".")) for n in imports(path) if n.startswith(prefix)
        ]
        assert not _other_families(path, layer, used)


@pytest.mark.parametrize(
    "layer, path",
    [
        p
        for layer in ("cpu", "cuda", "bindings")
        for p in _in_families(f"csrc/{layer}", ".cpp", ".h", ".cu", ".cuh")
    ],
)
def test_a_family_includes_itself_and_what_is_shared(layer, path):
    """Headers are named from the layer, as "policy/gae.h", or from csrc, as "cpu/policy/gae.h"."""
    used = [tuple(h.split("/")) for h in re.findall(r'#include "([^"]+)', path.read_text())]
    assert not _other_families(path, layer, used)
    assert not _other_families(path, layer, [parts[1:] for parts in used])


def test_a_family_that_uses_another_is_seen():
    path = KERNELS / "ops/preference/dpo_loss.py"
    used = [("common", "head"), ("preference", "x"), ("policy", "gae"), ("similarity",)]
    assert _other_families(path, "apt_kernels/ops", used) == ["policy/gae"]
    path = KERNELS / "reference/value.py"
    assert _other_families(path, "apt_kernels/reference", [("preference",)]) == ["preference"]
    assert not _other_families(path, "apt_kernels/reference", [("policy",), ("numerics",)])
