"""Builds the C++ extension through CMake and ninja; pyproject.toml holds everything else.

Environment: APT_KERNELS_NATIVE=0 installs pure Python (PyTorch and Triton only, no compiler);
APT_KERNELS_CUDA=AUTO|ON|OFF says whether the CUDA kernels are built (AUTO: where nvcc is found);
MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("APT_KERNELS_NATIVE", "1") != "0"


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
        in_place = self.inplace or self.editable_mode
        output = ROOT / "apt_kernels" if in_place else Path(self.build_lib) / "apt_kernels"
        build = ROOT / "build" / "cmake" if in_place else Path(self.build_temp) / "cmake"
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
            f"-DAPT_CUDA={os.environ.get('APT_KERNELS_CUDA', 'AUTO')}",
        ]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)

    def copy_extensions_to_source(self) -> None:
        """An in-place build writes there already."""


setup(
    ext_modules=[Extension("apt_kernels._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
