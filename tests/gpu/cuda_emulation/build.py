"""Builds the emulated kernels: csrc/cuda/*.cu, the emulator and C entry points, in one library."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .translate import translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"

# -fno-strict-aliasing: CUDA code reads its data through wider types, and nvcc lets it.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-fast-math", "-Wall")
FLAGS += ("-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-maybe-uninitialized")
SANITIZERS = {
    "": ((), ()),
    "address": (
        ("-fsanitize=address,undefined", "-fsanitize-recover=address", "-fno-omit-frame-pointer"),
        ("-DEMULATE_ASAN",),
    ),
    "thread": (("-fsanitize=thread",), ("-DEMULATE_TSAN",)),
}


class BuildError(RuntimeError):
    """g++ is missing or does not accept a source."""


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise BuildError(f"the emulation of CUDA needs a C++17 compiler; {name!r} is not there")
    return name


def cache_directory() -> Path:
    """build/cuda_emulation of the checkout, or a folder of temporary files if that is read-only."""
    folder = ROOT / "build" / "cuda_emulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"apt_cuda_emulation_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def build(sanitizer: str = "", patches: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """Returns the shared library of csrc/cuda, built unless the same sources were built before.

    Args:
        sanitizer: "", "address" (with undefined behaviour) or "thread".
        patches: `(file of csrc/cuda, text, replacement)`: bugs for the tests of the tests.
    """
    return link(kernel_objects(sanitizer, patches), sanitizer)


def kernel_objects(
    sanitizer: str = "", patches: tuple[tuple[str, str, str], ...] = ()
) -> list[Path]:
    """The object files of csrc/cuda and of their C entry points; arguments as of `build`."""
    sources = cuda_sources()
    for name, old, new in patches:
        if sources[name].count(old) != 1:
            raise ValueError(f"{name} contains {sources[name].count(old)} times, not once: {old!r}")
        sources[name] = sources[name].replace(old, new)
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    kernels = {name: text for name, text in sources.items() if name.endswith(".cu")}
    kernels["launchers.cpp"] = (HERE / "launchers.cpp").read_text()
    return [
        compile_object(name, text, sanitizer, included(text, headers))
        for name, text in kernels.items()
    ]


def cuda_sources() -> dict[str, str]:
    """The files of csrc/cuda by their names, which include one another as if in one folder."""
    files = sorted(CUDA_SOURCES.glob("*/*.cu*"))
    return {
        p.name: re.sub(r'#include "\w+/(\w+\.cuh)"', r'#include "\1"', p.read_text()) for p in files
    }


def _place(name: str) -> Path:
    """Where a source lies: in a family of csrc/cuda, or here."""
    return next(CUDA_SOURCES.glob(f"*/{name}"), HERE / name)


def included(text: str, headers: dict[str, str]) -> dict[str, str]:
    """The headers of csrc/cuda that `text` includes, and those that they include."""
    found = {}
    for name in re.findall(r'#include "(\w+\.cuh)"', text):
        found |= {name: headers[name]} | included(headers[name], headers)
    return found


def compile_object(
    name: str,
    text: str,
    sanitizer: str = "",
    headers: dict[str, str] | None = None,
    flags: tuple[str, ...] = (),
) -> Path:
    """Returns the object file of CUDA or C++ source `text`; `headers` lie beside it."""
    headers = headers or {}
    flags = (*FLAGS, *SANITIZERS[sanitizer][0], *flags)
    ours = [
        *(ROOT / "csrc/include/apt").iterdir(),
        *(HERE / "include").iterdir(),
        *HERE.glob("*.h"),
    ]
    parts = [text, compiler(), *flags, *headers.values(), *(p.read_text() for p in sorted(ours))]
    target = cache_directory() / f"{Path(name).stem}-{digest(*parts)}.o"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as folder:
        for header, content in headers.items():
            (Path(folder) / header).write_text(translate(content, str(_place(header))))
        source = Path(folder) / f"{Path(name).stem}.cpp"
        source.write_text(translate(text, str(_place(name))))
        include = (folder, HERE, HERE / "include", ROOT / "csrc" / "include")
        _run(target, [*(f"-I{i}" for i in include), *flags, "-c", str(source)])
    return target


def link(objects: list[Path], sanitizer: str = "", flags: tuple[str, ...] = ()) -> Path:
    """Returns the shared library of the objects and the emulator."""
    return _link(objects, sanitizer, ("-shared", *flags), ".so")


def program(objects: list[Path], sanitizer: str = "") -> Path:
    """Returns the program of the objects, one of which has a `main`, and the emulator."""
    return _link(objects, sanitizer, (), "")


def _link(objects: list[Path], sanitizer: str, flags: tuple[str, ...], suffix: str) -> Path:
    kernel_flags, emulator_flags = SANITIZERS[sanitizer]
    emulator = compile_object(  # never instrumented
        "emulator.cpp", (HERE / "emulator.cpp").read_text(), "", None, emulator_flags
    )
    objects = [*objects, emulator]
    target = cache_directory() / f"{digest(*(o.name for o in objects), sanitizer, *flags)}{suffix}"
    if not target.exists():
        _run(target, [*kernel_flags, *map(str, objects), *flags])
    return target


def _run(target: Path, arguments: list[str]) -> None:
    """Compiles to a file of this process, then renames: another process never sees half a file."""
    partial = target.with_name(f"{os.getpid()}-{target.name}")
    command = [compiler(), *arguments, "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    os.replace(partial, target)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
