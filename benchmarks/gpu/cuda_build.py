"""The CUDA sources for the GPU that is here, by nvcc alone: the extension and the driver.

    python benchmarks/gpu/cuda_build.py        builds both, side by side

No CMake, no pip: six sources and the bindings, some 20 seconds of one core. Where the package was
built with its CUDA kernels, those are used and the driver alone is built.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

from places import BUILD, ROOT
from records import Records

CASES = ("token_logprobs", "dpo_loss", "bradley_terry_loss", "gae", "mlm_mask")  # of driver.cpp
BINDINGS = ROOT / "csrc" / "bindings" / "cuda.cpp"
DRIVER = Path(__file__).with_name("driver.cpp")
OPTIONS = ("-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
WAIT_SECONDS = 120


class BuildError(RuntimeError):
    """nvcc is missing, does not accept a source, or did not end in time."""


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


@functools.cache
def operations() -> tuple[str, ...]:
    """The operations whose kernels all have a CUDA C++ form."""
    from apt_kernels import dispatch

    written = set(re.findall(r'm\.impl\("(\w+)"', BINDINGS.read_text()))
    return tuple(
        name
        for name, kernels in dispatch._KERNELS_OF.items()
        if kernels and set(kernels) <= written
    )


def is_installed() -> bool:
    """Whether the package was built with its CUDA kernels, and they load."""
    from apt_kernels import dispatch

    return dispatch._cuda_extension is not None


def folder() -> Path:
    """Of the state of the sources, of PyTorch and of the GPU."""
    texts = [p.read_bytes() for p in sorted((ROOT / "csrc").rglob("*.[ch]*")) + sources()]
    texts += [DRIVER.read_bytes(), _torch_version().encode(), architecture().encode()]
    return BUILD / hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _torch_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("torch")


@functools.cache
def architecture() -> str:
    """sm_XY of the GPU that is here; without one, the H200's."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "sm_90"
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return f"sm_{found[0].replace('.', '')}" if found else "sm_90"


def extension() -> Path:
    return folder() / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def driver() -> Path:
    return folder() / "driver"


def build() -> float:
    """Builds what is not there. Returns the seconds that it took.

    Raises:
        BuildError: there is no nvcc, or it does not accept a source.
    """
    if shutil.which("nvcc") is None:
        raise BuildError("nvcc is not installed")
    begin, here = time.monotonic(), folder()
    here.mkdir(parents=True, exist_ok=True)
    objects = {here / f"{source.stem}.o": source for source in sources()}
    wanted = {} if is_installed() else {here / "bindings_cuda.o": BINDINGS}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(lambda pair: _compile(*pair), {**objects, **wanted}.items()))
    targets = [(driver(), [DRIVER, *objects], ["-std=c++17", *_includes()])]
    if wanted:
        targets.append((extension(), [*objects, *wanted], ["-shared", *_torch_libraries()]))
    for target, inputs, options in targets:
        if not target.exists():
            _nvcc(target, ["-cudart", "static", *options, *map(str, inputs)])
    return time.monotonic() - begin


def _compile(target: Path, source: Path) -> None:
    if target.exists():
        return
    options = ["-std=c++17", *OPTIONS, *_includes(), "-c", str(source)]
    if source == BINDINGS:
        options += ["-O1", *_torch_includes()]
    _nvcc(target, [*options, f"-arch={architecture()}"])


def _nvcc(target: Path, options: list[str]) -> None:
    """To a file of this process, then renamed: nobody sees half a file."""
    partial = target.with_name(f"{os.getpid()}-{target.name}")
    command = ["nvcc", *options, "-o", str(partial)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
    os.replace(partial, target)


def _includes() -> list[str]:
    return [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}"]


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def _torch_includes() -> list[str]:
    include = _torch() / "include"
    folders = (sysconfig.get_path("include"), include, include / "torch/csrc/api/include")
    return [flag for path in folders for flag in ("-isystem", str(path))]


def _torch_libraries() -> list[str]:
    libraries = _torch() / "lib"
    return [f"-L{libraries}", "-ltorch_cpu", "-ldl", f"-Xlinker=-rpath,{libraries}"]


@functools.cache
def load() -> None:
    """Makes the backend "native" of the GPU callable, once the extension is built.

    Raises:
        BuildError: it was not built, or not in time.
    """
    import torch

    from apt_kernels import dispatch

    if is_installed():
        return
    wait_for(extension())
    spec = importlib.util.spec_from_file_location("_C_cuda", extension())
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    names = {kernel for name in operations() for kernel in dispatch._KERNELS_OF[name]}
    kernels = {name: getattr(torch.ops.apt, name).default for name in names}
    dispatch.add_backend("native", SimpleNamespace(**kernels), "cuda")


def wait_for(target: Path) -> None:
    """Returns when another process has built the file.

    Raises:
        BuildError: it was not built, or not in time.
    """
    end = time.monotonic() + WAIT_SECONDS
    while not target.exists():
        failed = folder() / "failed.txt"
        if failed.exists() or time.monotonic() > end:
            why = failed.read_text() if failed.exists() else f"no {target.name} in {WAIT_SECONDS} s"
            raise BuildError(why)
        time.sleep(0.2)


def main() -> str:
    """Builds; a failure is left in a file, for those who wait. Returns what became of it."""
    failed = folder() / "failed.txt"
    failed.unlink(missing_ok=True)
    try:
        seconds = build()
    except BuildError as error:
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.write_text(str(error))
        return f"not built: {str(error)[:400]}"
    what = "built with the package; the driver" if is_installed() else "extension and driver"
    return f"{what} built in {seconds:.1f} s for {architecture()}"


if __name__ == "__main__":
    outcome = main()
    print(outcome)
    if "APT_QUICK_RESULTS" in os.environ:
        results = Records(Path(os.environ["APT_QUICK_RESULTS"]), os.environ["APT_QUICK_STATE"])
        results.append("facts", "CUDA build", name="CUDA C++", value=outcome)
    sys.exit("not built" in outcome)
