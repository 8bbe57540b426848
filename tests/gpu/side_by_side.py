"""Other versions of Triton and PyTorch, beside those that are installed, for compilation alone.

Each is fetched once, into build/side_by_side. Where it is not to be had, `Unavailable` says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "side_by_side"
SECONDS = 300
TRITONS = ("3.5.1", "3.6.0")  # of PyTorch 2.9 and 2.10 to 2.12; 2.13 brings the one that is here
TORCHES = ("2.10.0", "2.11.0", "2.12.0")
# The smallest wheel that holds PyTorch's headers, 80 MB: nothing of it is run.
MAC = ("--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64")
MAC += ("--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:")


class Unavailable(RuntimeError):
    """A package cannot be had: no registry, no network, or none for this Python."""


def triton(version: str) -> Path:
    """The folder from which this Triton is imported, if it comes first in PYTHONPATH."""

    def install(folder: Path) -> None:
        _pip("install", "--target", str(folder), f"triton=={version}")

    return _once(f"triton-{version}", install)


def torch_headers(version: str) -> Path:
    """The folder of this PyTorch's headers."""

    def extract(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as wheels:
            _pip("download", *MAC, "--dest", wheels, f"torch=={version}")
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                headers = [n for n in wheel.namelist() if n.startswith("torch/include/")]
                wheel.extractall(folder, headers)

    return _once(f"torch-{version}", extract) / "torch" / "include"


def python(triton_version: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs this Python with another Triton, in a process of its own."""
    here = Path(__file__).parent
    paths = [triton(triton_version), here, ROOT, ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _once(name: str, make: Callable[[Path], None]) -> Path:
    target = FOLDER / name
    if not target.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=FOLDER))
        try:
            make(partial)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    command += ["--no-deps", "--quiet"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip took more than {SECONDS} s") from error
    if run.returncode != 0:
        raise Unavailable(run.stderr.strip()[-500:])
