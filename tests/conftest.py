"""Every test: one thread, deterministic algorithms (PyTorch then fills new memory with NaN, also in
C++), a fixed seed, and a compilation cache of its own (a stale one would replay old fakes)."""

import os
import tempfile

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="apt_inductor_"))
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
