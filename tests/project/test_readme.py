"""Every table and every example of the README is true today."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import readme
from apt_kernels.registry import OPS

PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_operations_table_is_that_of_the_registry():
    assert readme.section(TEXT, "operations") == readme.operations_table()


def test_measured_table_is_that_of_the_results_file():
    assert readme.section(TEXT, "measured") == readme.measured_table()


def test_page_of_all_figures_is_that_of_the_results_file():
    assert readme.BENCHMARKS.read_text() == readme.benchmarks_page()


def test_page_of_operations_is_that_of_the_docstrings():
    assert readme.OPERATIONS.read_text() == readme.operations_page()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_files_that_are_named_exist(page):
    for name in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / name).exists(), name


def test_an_operation_and_a_family_are_found_by_their_names():
    """The promise of the README about `git ls-files`."""
    for name, op in OPS.items():
        family = op.function.__module__.split(".")[2]
        for layer in ("ops", "registry"):
            assert (ROOT / "apt_kernels" / layer / family / f"{name}.py").exists(), name


def test_environment_variables_are_listed():
    """Every variable that a source reads stands in docs/installing.md."""
    listed = (ROOT / "docs/installing.md").read_text()
    read = re.compile(r"""(?:environ(?:\.get\(|\[|\.setdefault\()|getenv\()["'](APT_\w+)""")
    files = [
        p
        for folder in ("apt_kernels", "python", "csrc", "tests", "benchmarks")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h")
    ]
    for path in [ROOT / "setup.py", *files]:
        for name in read.findall(path.read_text()):
            assert f"`{name}`" in listed, f"{path.relative_to(ROOT)} reads {name}"


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= targets
