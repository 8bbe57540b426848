"""Copies of the Triton kernels with a bug in them."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

import apt_kernels


@pytest.fixture
def seeded(tmp_path, monkeypatch):
    """A function that gives a copy of the kernels with one text of one file replaced.

    The file is named as `family/name`, without its ending.
    """

    def seed(stem, text, replacement):
        folder = tmp_path / "bugged"
        ignored = shutil.ignore_patterns("__py*")
        shutil.copytree(Path(apt_kernels.__file__).with_name("triton"), folder, ignore=ignored)
        for file in folder.rglob("*.py"):
            source = file.read_text().replace("apt_kernels.triton", "bugged")
            if file.relative_to(folder).with_suffix("").as_posix() == stem:
                assert text in source, "the kernel has changed: seed the bug anew"
                source = source.replace(text, replacement)
            file.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module("bugged")

    yield seed
    for name in [name for name in sys.modules if name.split(".")[0] == "bugged"]:
        del sys.modules[name]
