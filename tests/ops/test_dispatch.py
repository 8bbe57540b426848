"""The choice of a backend, and installations that lack some of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import apt_kernels
from apt_kernels import dispatch, native
from apt_kernels.registry import OPS

X, IDS = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)


def test_backends_tells_what_is_there():
    facts = apt_kernels.backends()
    assert set(facts) == {"native", "cuda", "triton", "operations"}
    for devices in facts["operations"].values():
        assert devices["cpu"][-1] in ("reference", "triton", "cuda_emulation")
        assert "reference" in devices["cuda"]


def test_asking_for_a_backend_that_is_not_there_lists_those_that_are():
    with pytest.raises(ValueError, match=r"backend: expected one of \[.*'reference'.*got 'magic'"):
        apt_kernels.token_logprobs(X, IDS, backend="magic")


def test_a_device_without_kernels_uses_the_reference():
    x = X.to("meta")
    assert apt_kernels.token_logprobs(x, IDS.to("meta")).shape == (2, 3)


def test_float64_is_the_reference_s_on_a_gpu():
    gpu = torch.device("cuda")
    assert dispatch.choose("gae", gpu, None, torch.float64) == "reference"
    assert dispatch.choose("gae", gpu, "reference", torch.float64) == "reference"
    with pytest.raises(
        ValueError, match=r"expected one of \['reference'\] for float64 gae on cuda"
    ):
        dispatch.choose("gae", gpu, "triton", torch.float64)
    cpu = dispatch.choose("gae", torch.device("cpu"), None)
    assert dispatch.choose("gae", torch.device("cpu"), None, torch.float64) == cpu


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if torch.float64 in op.dtypes])
def test_every_operation_tells_its_dtype(name, monkeypatch):
    told, choose = [], dispatch.choose

    def noted(operation, device, requested, dtype=None):
        told.append(dtype)
        return choose(operation, device, requested, dtype)

    monkeypatch.setattr(dispatch, "choose", noted)
    sample = next(iter(OPS[name].samples(torch.float64)))
    OPS[name].function(*sample.args, **sample.kwargs)
    in_place = name in ("ema_update_", "queue_push_")  # whose kernels copy or convert float64 too
    assert told and set(told) == {None if in_place else torch.float64}


def test_how_float32_is_multiplied_follows_pytorch_s_settings():
    pytest.importorskip("triton")
    out = _python(
        "import torch\n"
        "from apt_kernels.triton.common import rows\n"
        "told = [rows.float32_products()]\n"
        "for precision in ('high', 'highest'):\n"
        "    torch.set_float32_matmul_precision(precision)\n"
        "    told.append(rows.float32_products())\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(*told, rows.float32_products())\n"
    )
    assert out.split() == ["tf32x3", "tf32", "tf32x3", "tf32"]


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_extension_and_triton_everything_runs_in_pure_pytorch():
    out = _python(
        "import sys\n"
        "sys.modules['apt_kernels._C'] = None\n"
        "sys.modules['triton'] = None\n"
        "import torch, apt_kernels\n"
        "x = torch.randn(2, 3, 8, requires_grad=True)\n"
        "apt_kernels.token_logprobs(x, torch.zeros(2, 3, dtype=torch.long)).sum().backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "facts = apt_kernels.backends()\n"
        "print(facts['native'], facts['operations']['token_logprobs']['cpu'])\n"
    )
    assert out.startswith("absent: not built")
    assert out.rstrip().endswith("['reference']")


def test_a_pytorch_that_is_too_old_is_named():
    out = _python(
        "import warnings\n"
        "import torch\n"
        "torch.__version__ = '2.6.0'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import apt_kernels\n"
        "print(apt_kernels.backends()['native'])\n"
        "print(*{str(w.message) for w in caught if 'apt_kernels._C ' in str(w.message)})\n"
    )
    reason = f"PyTorch {native.OLDEST_PYTORCH} or newer is needed, this is 2.6.0"
    told, *warned = out.splitlines()
    assert told == f"absent: {reason}"
    if not apt_kernels.backends()["native"].startswith("absent"):
        assert warned[0].startswith(f"apt_kernels._C is left out: {reason}. ")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler builds the broken library")
def test_a_library_that_cannot_be_loaded_is_named_and_warned_of_once(tmp_path):
    """Built for another PyTorch, it asks for a symbol that this one has not."""
    package = tmp_path / "apt_kernels"
    source = Path(apt_kernels.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "broken.c").write_text(
        "void *torch_of_another_version(void);\n"
        "void *PyInit__C(void) { return torch_of_another_version(); }\n"
    )
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["cc", "-shared", "-fPIC", tmp_path / "broken.c", "-o", library]
    subprocess.run(command, check=True)
    out = _python(
        "import sys, warnings\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, apt_kernels\n"
        "assert apt_kernels.dispatch._BACKENDS['dpo_loss', 'cpu'] == ('reference',)\n"
        "print(apt_kernels.backends()['native'])\n"
        "for w in caught:\n"
        "    if 'apt_kernels' in str(w.message):\n"
        "        print(w.category.__name__, w.message)\n"
    )
    told, *warned = out.splitlines()
    assert told.startswith(f"absent: built for PyTorch {native.OLDEST_PYTORCH} and newer, cannot")
    assert torch.__version__ in told and "torch_of_another_version" in told
    (warning,) = warned
    assert warning.startswith("RuntimeWarning apt_kernels._C is left out: built for PyTorch")
    assert "Install apt_kernels again" in warning


def test_the_extension_asks_pytorch_for_its_stable_abi_alone():
    """So one build serves every PyTorch from the oldest on."""
    extension = dispatch._extension
    if extension is None or shutil.which("nm") is None:
        pytest.skip("the extension or nm is not here")
    command = ["nm", "-D", "--undefined-only", extension.__file__]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    of_torch = {s for s in symbols if re.search("torch|c10|at6|_ZN2at|caffe", s)}
    assert "aoti_torch_empty_strided" in of_torch
    assert not {s for s in of_torch if not re.fullmatch(r"(aoti_)?torch_[a-z0-9_]+", s)}
    assert not {s for s in symbols if s.startswith(("GOMP_", "omp_"))}  # threads are PyTorch's
    assert "torch_exception_get_what_without_backtrace" not in of_torch  # of 2.13


def test_a_triton_that_is_too_old_is_left_out_and_named():
    pytest.importorskip("triton")
    out = _python(
        "from importlib import metadata\n"
        "metadata.version = lambda name: '3.4.0'\n"
        "import apt_kernels\n"
        "facts = apt_kernels.backends()\n"
        "print(facts['triton'], facts['operations']['gae']['cuda'])\n"
    )
    assert out.startswith("absent: ImportError: Triton 3.5")
    assert "3.4.0" in out and "'triton'" not in out


def test_triton_is_not_imported_before_a_launcher_is_asked_for():
    pytest.importorskip("triton")
    out = _python(
        "import sys, apt_kernels\n"
        "print('triton' in sys.modules, 'numpy' in sys.modules)\n"
        "apt_kernels.dispatch._triton.dpo_loss_fwd\n"
        "print('triton' in sys.modules)\n"
    )
    assert out.split() == ["False", "True", "True"]


@pytest.mark.parametrize("asked, got", [("baseline", "baseline"), ("avx2", "avx2")])
def test_the_instruction_set_can_be_lowered(asked, got):
    if "avx" not in apt_kernels.backends()["native"]:
        pytest.skip("this processor has one instruction set only")
    out = _python(
        "import apt_kernels; print(apt_kernels.backends()['native'])", APT_KERNELS_ISA=asked
    )
    assert out.rstrip().endswith(got)
