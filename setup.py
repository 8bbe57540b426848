"""Builds the C++ extension through CMake and ninja; pyproject.toml holds everything else.

Environment: APT_KERNELS_NATIVE=0 installs pure Python (PyTorch and Triton only, no compiler);
APT_KERNELS_CUDA=AUTO|ON|OFF says whether the CUDA kernels are built (AUTO: where a GPU and nvcc
are); MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
IN_PLACE = ROOT / "build" / "cmake"
NATIVE = os.environ.get("APT_KERNELS_NATIVE", "1") != "0"
CUDA = os.environ.get("APT_KERNELS_CUDA", "AUTO")


def _has_stable_abi() -> bool:
    """Whether the PyTorch that is here can build the kernels; an older one runs without them."""
    text = (ROOT / "apt_kernels" / "native.py").read_text()
    oldest = re.search(r'^OLDEST_PYTORCH = "(\d+)\.(\d+)"', text, re.M)
    here = metadata.version("torch")
    if tuple(map(int, here.split("+")[0].split(".")[:2])) >= tuple(map(int, oldest.groups())):
        return True
    print(f"apt_kernels without its C++ kernels: PyTorch {here} is too old", file=sys.stderr)
    return False


def _tool(name: str) -> str:
    """A program of this environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(
            f"building apt_kernels needs {name} (pip install {name}); "
            "APT_KERNELS_NATIVE=0 installs without the C++ kernels"
        )
    return found


class CMakeBuild(build_ext):
    """One CMake build makes all extension modules."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.build_lib) / "apt_kernels"
        if self.inplace or self.editable_mode:
            self._build(IN_PLACE, ROOT / "apt_kernels")
        elif self._built_in_place():
            subprocess.run([_tool("cmake"), "--build", str(IN_PLACE)], check=True)
            package.mkdir(parents=True, exist_ok=True)
            for library in (ROOT / "apt_kernels").glob("_C*.so"):
                shutil.copy2(library, package)
        else:
            self._build(Path(self.build_temp) / "cmake", package)

    @staticmethod
    def _built_in_place() -> bool:
        """`make setup` built for this Python and this choice: a wheel holds the same files."""
        cache = IN_PLACE / "CMakeCache.txt"
        text = cache.read_text() if (IN_PLACE / "build.ninja").exists() else ""
        return all(
            re.search(rf"^{name}:\w+={re.escape(value)}$", text, re.M)
            for name, value in (("Python_EXECUTABLE", sys.executable), ("APT_CUDA", CUDA))
        )

    @staticmethod
    def _build(build: Path, output: Path) -> None:
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        cmake = _tool("cmake")
        configure = [
            cmake,
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.resolve()}",
            f"-DAPT_CUDA={CUDA}",
        ]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)

    def copy_extensions_to_source(self) -> None:
        """An in-place build writes there already."""


setup(
    ext_modules=[Extension("apt_kernels._C", sources=[])] if NATIVE and _has_stable_abi() else [],
    cmdclass={"build_ext": CMakeBuild},
)
