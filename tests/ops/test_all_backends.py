"""The registry's samples once more on the backends that need a process of their own.

The instruction sets below the processor's best, Triton's kernels under its interpreter, and the
CUDA sources under the emulation of tests/gpu: each is chosen by environment variables that are read
when modules are imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import apt_kernels

RUNS = {
    "avx2": {"APT_KERNELS_ISA": "avx2", "APT_TEST_BACKEND": "native"},
    "baseline": {"APT_KERNELS_ISA": "baseline", "APT_TEST_BACKEND": "native"},
    "avx512": {"APT_KERNELS_ISA": "avx512", "APT_TEST_BACKEND": "native"},
    "avx512_bf16": {"APT_KERNELS_ISA": "avx512_bf16", "APT_TEST_BACKEND": "native"},
    "triton": {"TRITON_INTERPRET": "1", "APT_TEST_BACKEND": "triton"},
    "triton_compiled": {"TRITON_INTERPRET": "1", "APT_TEST_BACKEND": "triton"},
    "cuda_emulation": {"APT_TEST_CUDA_EMULATION": "1", "APT_TEST_BACKEND": "cuda_emulation"},
}


@pytest.mark.parametrize("name", RUNS)
def test_registry_samples(name):
    if name in ("avx2", "baseline") and "avx" not in apt_kernels.backends()["native"]:
        pytest.skip("this processor has one instruction set only")
    if name.startswith("avx512") and "avx512" not in apt_kernels.backends()["native"]:
        pytest.skip("this processor has no AVX-512")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name("test_ops.py")), "-k", "values_and_gradients"]
    if name.startswith("avx512"):  # bfloat16 products as floats, and by vectors instead of tiles
        command[-1] += " and bfloat16 and (linear or info_nce or nt_xent or siglip or sup_con)"
    if name == "triton":  # the others in tests/gpu/test_triton_interpreter.py, on smaller calls
        command[-1] += " and (bradley_terry_loss or dpo_loss) and not linear"
    if name == "triton_compiled":  # its launchers as operators of torch.compile
        command[-1] = "one_graph or no_recompilation or opcheck"
    run = subprocess.run(command, env={**os.environ, **RUNS[name]}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) >= 50, run.stdout[-500:]


OF_INFINITIES = "preference/test_infinite_logps.py"
IN_PLACE = "contrastive/test_bookkeeping.py"
# By the interpreter the types whose formulas differ, each with both signs of the difference.
FEW = "(plain or hinge or exo_pair or discopop) and not aot and not norm or nan"


@pytest.mark.parametrize(
    "backend, file, chosen",
    [
        ("triton", OF_INFINITIES, FEW),
        ("cuda_emulation", OF_INFINITIES, ""),
        ("triton", IN_PLACE, "(in_turn or share or columns or between) and not large"),
    ],
)
def test_what_the_registry_cannot_say(backend, file, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = f"{backend} and ({chosen})" if chosen else backend
    command += [str(Path(__file__).parent / file), "-k", chosen]
    environment = {**os.environ, **RUNS[backend]}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", run.stdout), run.stdout[-500:]
