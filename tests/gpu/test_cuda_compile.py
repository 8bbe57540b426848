"""The CUDA sources through nvcc, for GPUs that are not here, and their bindings to PyTorch."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from apt_kernels import dispatch
from gpu import side_by_side
from gpu.cuda_emulation.build import (
    ROOT,
    cache_directory,
    compile_object,
    digest,
    kernel_objects,
    link,
)
from gpu.cuda_emulation.checks import CHECKS

ARCHITECTURES = ("sm_75", "sm_80", "sm_90a", "sm_100")
KERNELS_OF = {  # how many kernels each source has: dtypes times variants
    "token_logprobs.cu": 3 * 4 + 3 * 2,
    "dpo_loss.cu": 3,
    "bradley_terry_loss.cu": 3,
    "pair_loss.cu": 1,
    "mlm_mask.cu": 2,
    "gae.cu": 3 + 3 + 3,
}
MAX_REGISTERS = 64  # two blocks of 512 threads on a multiprocessor
MAX_SHARED_BYTES = 48 << 10
OPERATORS = ("token_logprobs_fwd", "token_logprobs_bwd", "dpo_loss_fwd", "bradley_terry_loss_fwd")
OPERATORS += ("gae_fwd", "mlm_mask_fwd")

INCLUDES = (f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}")
SHARED = ("-std=c++17", "-O1", "-shared", "-cudart", "static")
SHARED += ("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Werror")

TORCH = Path(torch.__file__).parent
STABLE_ABI = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 13)
needs_stable_abi = pytest.mark.skipif(
    not STABLE_ABI, reason=f"the stable ABI of torch 2.13 is needed, this is {torch.__version__}"
)


def _run(*command: str | Path) -> str:
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed: the CUDA sources are emulated but not compiled")
    return found


@pytest.fixture(scope="module")
def compiled(nvcc) -> dict[str, tuple[Path, str]]:
    """Object file and messages of ptxas of every source, compiled for all architectures."""
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
    for architecture in ARCHITECTURES:
        number = architecture.removeprefix("sm_")
        options += ["-gencode", f"arch=compute_{number},code={architecture}"]
    options += INCLUDES
    headers = [*(ROOT / "csrc/cuda").glob("*/*.cuh"), *(ROOT / "csrc/include/apt").iterdir()]
    common = [*options, _run(nvcc, "--version"), *(h.read_text() for h in sorted(headers))]
    results = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*/*.cu")):
        target = cache_directory() / f"nvcc-{source.stem}-{digest(*common, source.read_text())}.o"
        messages = target.with_suffix(".txt")
        if not messages.exists():
            messages.write_text(_run(nvcc, *options, "-c", source, "-o", target))
        results[source.name] = target, messages.read_text()
    return results


def test_every_source_is_in_the_table(compiled):
    assert set(compiled) == set(KERNELS_OF)


@pytest.mark.parametrize("source", KERNELS_OF)
def test_no_spills_and_few_registers(compiled, source):
    messages = compiled[source][1]
    assert "warning" not in messages
    for architecture in ARCHITECTURES:
        assert (
            len(re.findall(rf"entry function .* for '{architecture}'", messages))
            == (KERNELS_OF[source])
        )
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", messages)
    registers = re.findall(r"Used (\d+) registers", messages)
    assert len(frames) == len(registers) == KERNELS_OF[source] * len(ARCHITECTURES)
    assert set(frames) == {("0", "0")}, "local memory is used"
    assert max(map(int, registers)) <= MAX_REGISTERS
    assert max([0, *map(int, re.findall(r"(\d+) bytes smem", messages))]) <= MAX_SHARED_BYTES


def test_streaming_kernels_load_and_store_16_bytes(nvcc, tmp_path):
    target = tmp_path / "token_logprobs.ptx"
    source = ROOT / "csrc" / "cuda" / "logprobs" / "token_logprobs.cu"
    _run(nvcc, "-std=c++17", "-O3", "-arch=sm_80", *INCLUDES, "-ptx", source, "-o", target)
    kernels = re.split(r"\.entry ", target.read_text())[1:]
    assert len(kernels) == KERNELS_OF["token_logprobs.cu"]
    for kernel in kernels:
        name = kernel.split("(", 1)[0]
        assert kernel.count("ld.global.cs.v4") >= 4, f"{name}: four loads in flight"
        if "bwd" in name:
            assert kernel.count("ld.global.nc.v4") >= 2, f"{name}: shifted loads"
            assert "st.global.cs.v4" in kernel
        assert not re.search(r"\b(atom|red)\.\S*f(16|32|64)", kernel), f"{name}: a float atomic"


def test_the_library_loads_without_a_driver(nvcc, compiled, tmp_path):
    """Torch-free, with the CUDA runtime inside; a launch reports an error instead of crashing."""
    library = tmp_path / "libapt_cuda.so"
    launch = tmp_path / "launch.cpp"
    launch.write_text(
        '#include "apt/dpo_loss.h"\n'
        'extern "C" __attribute__((visibility("default"))) int launch() {\n'
        "  float x[8] = {};\n"
        "  apt::cuda::DpoOptions options = {};\n"
        "  return apt::cuda::dpo_loss_fwd(x, x, x, x, apt::cuda::DType::kFloat32, 1, options, x,\n"
        "                                 x, x, x, x, nullptr);\n"
        "}\n"
    )
    objects = [target for target, _ in compiled.values()]
    include = f"-I{ROOT / 'csrc' / 'include'}"
    _run(nvcc, *SHARED, include, launch, *objects, "-o", library)
    needed = _run("readelf", "-d", library)
    assert not re.search(r"NEEDED.*(torch|c10|cuda|python)", needed)
    if not torch.cuda.is_available():
        assert ctypes.CDLL(str(library)).launch() != 0


# ---------------------------------------------------------------- registration


def _torch_flags(include: Path = TORCH / "include") -> list[str]:
    includes = (include, include / "torch" / "csrc" / "api" / "include")
    includes = (sysconfig.get_path("include"), *map(str, includes))
    return [flag for folder in includes for flag in ("-isystem", folder)]


def _torch_libraries() -> list[str]:
    return [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]


def _schemas(namespace: str) -> str:
    """Python code that declares the operators, in a process without our extension."""
    schemas = [dispatch.SCHEMAS[name] for name in OPERATORS]
    return (
        "import torch\n"
        f"library = torch.library.Library({namespace!r}, 'FRAGMENT')\n"
        f"for schema in {schemas}:\n"
        "    library.define(schema)\n"
    )


@needs_stable_abi
def test_bindings_register_the_cuda_key(nvcc, compiled, tmp_path):
    """Compiled, linked and imported beside this PyTorch, in a process without our extension."""
    extension = tmp_path / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [target for target, _ in compiled.values()]
    include = (f"-I{ROOT / 'csrc' / 'include'}", *_torch_flags())
    source = ROOT / "csrc" / "bindings" / "cuda.cpp"
    link_flags = [f.replace("-Wl,", "-Xlinker=", 1) for f in _torch_libraries()]
    _run(nvcc, *SHARED, *include, source, *objects, *link_flags, "-o", extension)
    code = _schemas("apt") + (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import _C_cuda\n"
        f"for name in {OPERATORS}:\n"
        "    print(torch._C._dispatch_dump('apt::' + name))\n"
    )
    registered = re.findall(
        r"^CUDA: registered at .*bindings/cuda\.cpp", _run(sys.executable, "-c", code), re.M
    )
    assert len(registered) == len(OPERATORS)


@pytest.mark.parametrize("version", side_by_side.TORCHES)
def test_bindings_compile_with_an_older_pytorch(nvcc, tmp_path, version):
    """Nothing of torch_cuda is linked: a CPU build has none."""
    try:
        headers = side_by_side.torch_headers(version)
    except side_by_side.Unavailable as why:
        pytest.skip(f"PyTorch {version} is not to be had, nothing is compiled with it: {why}")
    target, source = tmp_path / "bindings.o", ROOT / "csrc" / "bindings" / "cuda.cpp"
    flags = ("-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Werror")
    include = (f"-I{ROOT / 'csrc' / 'include'}", *_torch_flags(headers))
    _run(nvcc, *flags, *include, "-c", source, "-o", target)
    symbols = set(re.findall(r"U (\w*torch\w*)", _run("nm", target)))
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in symbols)
    assert not any("cuda_stream" in name for name in symbols)


GPU_HERE = """#!/bin/sh
printf '9.0\\n9.0\\n8.0\\n'
"""


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_architectures_of_a_build(nvcc, tmp_path, monkeypatch):
    """What APT_KERNELS_CUDA_ARCHS says; else the GPUs that are here; else the list."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(GPU_HERE)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    options = ("-DAPT_TORCH=OFF", "-DAPT_CUDA=ON", "-S", ROOT, "-B", tmp_path / "build")
    monkeypatch.setenv("APT_KERNELS_CUDA_ARCHS", "80-real,90")
    assert "-- CUDA kernels for 80-real;90\n" in _run("cmake", *options)
    monkeypatch.delenv("APT_KERNELS_CUDA_ARCHS")
    assert "-- CUDA kernels for 90;80\n" in _run("cmake", *options)
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert "-- CUDA kernels for 75-real;80-real;" in _run("cmake", *options)


ACCELERATOR = """
#pragma once
#include <cstdint>
namespace torch::stable::accelerator {
using DeviceIndex = int32_t;
struct DeviceGuard { explicit DeviceGuard(int32_t) {} };
}
"""
STREAM = """
int aoti_torch_get_current_cuda_stream(int device, void **stream) { *stream = 0; return 0; }
"""


@needs_stable_abi
@pytest.mark.skipif(sys.platform != "linux", reason="the emulation needs Linux")
def test_bindings_pass_on_every_argument(tmp_path):
    """The bindings linked with the emulated kernels, as CPU operators: all checks through them."""
    accelerator = tmp_path / "torch" / "csrc" / "stable" / "accelerator.h"
    accelerator.parent.mkdir(parents=True)
    accelerator.write_text(ACCELERATOR)
    source = (ROOT / "csrc" / "bindings" / "cuda.cpp").read_text()
    assert source.count("STABLE_TORCH_LIBRARY_IMPL(apt, CUDA, m)") == 1
    source = source.replace(
        "STABLE_TORCH_LIBRARY_IMPL(apt, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(apt_emulated, CPU, m)"
    )
    assert source.count("libtorch_cuda.so") == 1
    source = source.replace("libtorch_cuda.so", "libstream_of_tests.so")
    stream = tmp_path / "libstream_of_tests.so"
    stream.with_suffix(".c").write_text(STREAM)
    name = f"-Wl,-soname,{stream.name}"
    _run("cc", "-shared", "-fPIC", name, stream.with_suffix(".c"), "-o", stream)
    ctypes.CDLL(str(stream))
    library = _link_bindings(source, tmp_path)
    namespace: dict = {}
    exec(_schemas("apt_emulated"), namespace)
    torch.ops.load_library(library)
    for name, check in CHECKS.items():
        if name not in ("wide_strides", "many_pairs"):
            check(torch.ops.apt_emulated)
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16"):
        torch.ops.apt_emulated.bradley_terry_loss_fwd(*torch.zeros(2, 3).double(), None, 0, 0, 1)


def _link_bindings(source: str, folder: Path) -> Path:
    flags = (f"-I{folder}", *_torch_flags())
    bindings = compile_object("cuda.cpp", source, flags=flags)
    return link([*kernel_objects(), bindings], flags=tuple(_torch_libraries()))
