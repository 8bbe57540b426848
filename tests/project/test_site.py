"""The documentation site: every example and tutorial runs, and it builds without a warning."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
INCLUDED = re.compile(r'^--8<-- "(.*)"$', re.M)
PROGRAMS = [
    ROOT / "examples" / f"{name}.py" for name in ("own_loop", "measure_here", "dpo_trainer")
]


def test_every_operation_has_an_example():
    assert [path.stem for path in EXAMPLES] == sorted(OPS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_of_operations_run(path):
    exec(compile(path.read_text(), str(path), "exec"), {})


def _code(path: Path) -> str:
    """The program of a file, or the code blocks of a page with the files that they include."""
    text = path.read_text()
    if path.suffix == ".py":
        return text
    code = "\n".join(re.findall(r"``` ?(?:python|{\.python})\n(.*?)```", text, re.S))
    return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(), code)


@pytest.mark.parametrize("path", [*TUTORIALS, *PROGRAMS], ids=lambda path: path.name)
def test_tutorials_and_programs_run(path, tmp_path):
    """Each in a process of its own, as a reader would run it."""
    code = _code(path)
    assert "assert " in code
    (tmp_path / "tutorial.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "tutorial.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_site_builds_without_a_warning(tmp_path):
    """Also a link that leads nowhere is one."""
    pytest.importorskip("mkdocstrings", reason="pip install '.[docs]'")
    pytest.importorskip("material", reason="pip install '.[docs]'")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name, op in OPS.items():
        page = html.unescape((tmp_path / "operations" / f"{name}.html").read_text())
        assert op.source.split(",")[0] in page and "Parameters" in page, name
