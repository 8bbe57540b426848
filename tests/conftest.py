"""Every test: one thread, deterministic algorithms (PyTorch then fills new memory with NaN, also in
C++), a fixed seed, and a compilation cache of its own (a stale one would replay old fakes)."""

import atexit
import os
import shutil
import tempfile

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="apt_inductor_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


if os.environ.get("TRITON_INTERPRET") == "1":
    from gpu import triton_interpreter

    triton_interpreter.install()

if os.environ.get("APT_TEST_CUDA_EMULATION") == "1":
    from apt_kernels import dispatch
    from gpu import cuda_emulation

    dispatch.add_backend("cuda_emulation", cuda_emulation.kernels())
