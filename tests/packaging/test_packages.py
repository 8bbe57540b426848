"""The sdist and the wheel, each installed into an empty environment and used there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 6 << 20
TORCH_LIBRARIES = ("libtorch*", "libc10*")
BUILT = ROOT / "build" / "cmake" / "CMakeCache.txt"

TRY = """
import torch, apt_kernels
print(apt_kernels.__file__)
print(apt_kernels.backends()["native"])
x = torch.randn(2, 3, 8, requires_grad=True)
apt_kernels.token_logprobs(x, torch.zeros(2, 3, dtype=torch.long)).sum().backward()
assert x.grad.abs().sum() > 0
"""


def _run(*command: str | Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    run = subprocess.run(
        [*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
    return run.stdout


def _wheel(source: Path, folder: Path, **environment: str) -> Path:
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    _run(sys.executable, "-m", "pip", "wheel", *options, source, **environment)
    return next(folder.glob("*.whl"))


def _tried(wheel: Path, folder: Path) -> str:
    """What `backends()` says of the C++ kernels beside nothing but PyTorch."""
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = ("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    _run(sys.executable, "-m", "pip", *pip)
    site = Path(_run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site / "with_torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    path, native = _run(python, "-I", "-c", TRY).splitlines()
    assert Path(path).is_relative_to(folder)
    return native


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    _run(sys.executable, "-c", code)
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("apt_kernels", "csrc", "python", "CMakeLists.txt", "setup.py", "pyproject.toml")
    tracked = _run("git", "ls-files", *folders, "LICENSE", "README.md").split()
    assert tracked and not set(tracked) - held


def test_the_sdist_is_installed_without_a_compiler(sdist, tmp_path):
    """Its sources are those of the wheel below, so they are not compiled here once more."""
    wheel = _wheel(sdist, tmp_path, APT_KERNELS_NATIVE="0")
    assert wheel.name.endswith("-none-any.whl")
    assert _tried(wheel, tmp_path / "environment").startswith("absent: not built")


@pytest.mark.skipif(not BUILT.exists(), reason="the extension was not built in this folder")
def test_the_wheel_is_for_any_linux(tmp_path):
    """It holds what `make setup` has built; nothing is compiled."""
    pytest.importorskip("auditwheel")
    cuda = re.search(r"^APT_CUDA:\w+=(\w+)$", BUILT.read_text(), re.M)[1]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    built = _wheel(ROOT, tmp_path, APT_KERNELS_CUDA=cuda)
    excluded = [option for name in TORCH_LIBRARIES for option in ("--exclude", name)]
    command = ("repair", "--strip", *excluded, "--wheel-dir", tmp_path / "dist", built)
    _run(sys.executable, "-m", "auditwheel", *command, PATH=tools)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert re.search(r"-manylinux_\d+_\d+_\w+\.whl$", wheel.name)
    assert wheel.stat().st_size <= MOST_BYTES
    libraries = [n for n in zipfile.ZipFile(wheel).namelist() if ".so" in n]
    assert libraries and all(n.startswith("apt_kernels/_C") for n in libraries)
    assert _tried(wheel, tmp_path / "environment").startswith("C++ for the CPU")
