"""Every table and every example of the README is true today."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import readme

TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_operations_table_is_that_of_the_registry():
    assert readme.section(TEXT, "operations") == readme.operations_table()


def test_measured_table_is_that_of_the_results_file():
    assert readme.section(TEXT, "measured") == readme.measured_table()


def test_page_of_all_figures_is_that_of_the_results_file():
    assert readme.BENCHMARKS.read_text() == readme.benchmarks_page()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert EXAMPLES


def test_files_that_are_named_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / name).exists(), name


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= targets
