"""docs/gpu.md tells what the tests and the registry hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_those_of_the_sources(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_docs

    assert gpu_docs.page() == gpu_docs.PAGE.read_text(), "run python benchmarks/gpu_docs.py"


def test_what_others_publish_stands_beside_a_shape_that_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_docs

    table = gpu_docs.PAGE.read_text()
    for words in gpu_docs.PUBLISHED.values():
        assert words in table
    assert "gpu_docs" in sys.modules
