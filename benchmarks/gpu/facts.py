"""What the machine is, and what its memory and its matrix units give at most."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

import timing
from places import ROOT, device

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
PACKAGES = ("triton", "numpy", "pytest", "trl", "transformers", "flash-attn", "quack-kernels")
PACKAGES += ("liger-kernel", "cut-cross-entropy", "memeff", "siglip-kernel", "rl-triton")
PACKAGES += ("torchrl", "lightly", "open-clip-torch")
QUERY = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
ITEMS = ("machine", "versions", "copy", "product")


def items(only: list[str]) -> list[str]:
    return list(ITEMS)


def measure(item: str) -> Iterator[dict]:
    return {"machine": machine, "versions": versions, "copy": copy, "product": product}[item]()


def machine() -> Iterator[dict]:
    yield {"name": "cores", "value": str(len(os.sched_getaffinity(0)))}
    if device() == "cpu":
        yield {"name": "processor", "value": platform.machine()}
        return
    about = torch.cuda.get_device_properties(0)
    yield {"name": "GPU", "value": about.name}
    yield {"name": "multiprocessors", "value": str(about.multi_processor_count)}
    yield {"name": "memory", "value": f"{about.total_memory / 2**30:.1f} GiB"}
    yield {"name": "second-level cache", "value": f"{about.L2_cache_size / 2**20:.0f} MiB"}
    yield {"name": "compute capability", "value": f"{about.major}.{about.minor}"}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        yield {"name": QUERY, "value": run.stdout.strip() or run.stderr.strip()}


def versions() -> Iterator[dict]:
    yield {"name": "Python", "value": platform.python_version()}
    yield {"name": "PyTorch", "value": f"{torch.__version__} (CUDA {torch.version.cuda})"}
    yield {"name": "commit", "value": commit()}
    for tool in TOOLS:
        yield {"name": tool, "value": shutil.which(tool) or "not installed"}
    for package in PACKAGES:
        try:
            yield {"name": package, "value": importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            yield {"name": package, "value": "not installed"}


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown (no git)"
    command = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown (no repository)"


def copy() -> Iterator[dict]:
    """Bytes read and written a second by a copy of more than any cache holds."""
    count = 2**31 if device() == "cuda" else 2**25
    source = torch.ones(count // 4, device=device())
    target = torch.empty_like(source)
    found = timing.of(lambda: target.copy_(source), seconds=1.0)
    yield {"name": "copy", "unit": "B/s", "rate": 2 * count / found["ms"] * 1e3, **found}


def product() -> Iterator[dict]:
    """Operations a second of a bfloat16 product; of random numbers, as zeros cost less power."""
    n = 8192 if device() == "cuda" else 512
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    found = timing.of(lambda: a @ b, seconds=1.0)
    yield {"name": "product", "unit": "FLOP/s", "rate": 2 * n**3 / found["ms"] * 1e3, **found}
