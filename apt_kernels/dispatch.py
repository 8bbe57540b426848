"""Which backends were built and installed, and which one an operation uses on a device.

A backend is a namespace of functions `X_fwd` and `X_bwd` with one signature per name: `native`
(`torch.ops.apt`: C++ on the CPU, CUDA C++ on NVIDIA GPUs) and `triton` (`apt_kernels.triton`).
`reference` is plain PyTorch and always there. Everything is decided when an operation's module is
imported; a call is two dictionary look-ups, which torch.compile traces.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native

# Which backend comes first on a device; the page of `make gpu-report` says how to change the
# second table, operation by operation.
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
PREFERENCE_OF_OPERATION: dict[tuple[str, str], tuple[str, ...]] = {}

_CPU = torch.device("cpu")
INTERPRETING_TRITON = os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton() -> tuple[Any, str]:
    """The names of its launchers; Triton itself comes later."""
    try:
        return importlib.import_module("apt_kernels.triton"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


_extension, _extension_error = native.load(
    "_C", "not built (APT_KERNELS_NATIVE=0, or no C++ compiler)"
)
_cuda_extension, _cuda_extension_error = native.load(
    "_C_cuda", "not built (it is where a GPU and nvcc are, and with APT_KERNELS_CUDA=ON)"
)
_triton, _triton_error = _load_triton()

# (kernel, backend) -> function; (operation, device) -> backends in order of preference
_KERNELS: dict[tuple[str, str], Callable] = {}
_BACKENDS: dict[tuple[str, str], tuple[str, ...]] = {}
_KERNELS_OF: dict[str, tuple[str, ...]] = {}
SCHEMAS: dict[str, str] = {}
# Operators of the native kernels, and of the Triton launchers for torch.compile, which takes them
# whole. A call without torch.compile does not pay for the latter.
_NATIVE_LIBRARY = torch.library.Library("apt", "FRAGMENT")
_TRITON_LIBRARY = torch.library.Library("apt_triton", "FRAGMENT")
_TRACED: dict[str, Callable] = {}


def define(schema: str) -> None:
    """Declares a kernel, which all backends call with these arguments in this order.

    Called once by the module of an operation, with a schema of `torch.library`, as
    `X_fwd(Tensor logits, float temperature) -> Tensor`.
    """
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    _NATIVE_LIBRARY.define(schema)
    if _has_native(name, "cpu"):
        # The overload is 1 us faster than its packet.
        _KERNELS[name, "native"] = getattr(torch.ops.apt, name).default
    if _triton is not None and name in _triton.LAUNCHERS:
        _KERNELS[name, "triton"] = _on_first_call(name)
        _TRITON_LIBRARY.define(schema)
        _TRITON_LIBRARY.impl(name, _launched(name), "CompositeExplicitAutograd")
        _TRACED[name] = getattr(torch.ops.apt_triton, name).default


def _on_first_call(name: str) -> Callable:
    """A launcher that takes the place of this function when it is called: Triton loads slowly."""

    def load(*arguments: Any, **named: Any) -> Any:
        launcher = getattr(_triton, name)
        if _KERNELS[name, "triton"] is load:
            _KERNELS[name, "triton"] = launcher
        return launcher(*arguments, **named)

    return load


def _launched(name: str) -> Callable:
    return lambda *arguments, **named: getattr(_triton, name)(*arguments, **named)


def _has_native(kernel: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"apt::{kernel}", key)


def register(operation: str, *kernels: str) -> None:
    """Called once by the module of an operation, with the names of its kernels."""
    _KERNELS_OF[operation] = kernels
    for device, order in PREFERENCE.items():
        order = PREFERENCE_OF_OPERATION.get((operation, device), order)
        _BACKENDS[operation, device] = tuple(b for b in order if _available(operation, device, b))
    if INTERPRETING_TRITON and all((k, "triton") in _KERNELS for k in kernels):
        _BACKENDS[operation, "cpu"] += ("triton",)


def _available(operation: str, device: str, backend: str) -> bool:
    if backend == "reference":
        return True
    kernels = _KERNELS_OF[operation]
    if not kernels or not all((k, backend) in _KERNELS for k in kernels):
        return False
    return backend != "native" or all(_has_native(k, device) for k in kernels)


def choose(
    operation: str, device: torch.device, requested: str | None, dtype: torch.dtype | None = None
) -> str:
    """The backend of a call: the one that was asked for by name, or the first in preference.

    dtype: of the arithmetic. GPU kernels have no float64, only the reference has.
    """
    device_type = "cpu" if device == _CPU else device.type  # device.type forms a string: 0.5 us
    available = _BACKENDS.get((operation, device_type), ("reference",))
    only_reference = dtype == torch.float64 and device_type != "cpu"
    if only_reference:
        available = ("reference",)
    if requested is None:
        return available[0]
    if requested not in available:
        kind = "float64 " if only_reference else ""
        raise ValueError(
            f"backend: expected one of {list(available)} for {kind}{operation} on {device_type}, "
            f"got {requested!r} (apt_kernels.backends() tells what was built)"
        )
    return requested


def kernel(name: str, backend: str) -> Callable:
    if backend == "triton" and name in _TRACED and torch.compiler.is_compiling():
        return _TRACED[name]
    return _KERNELS[name, backend]


def written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that a kernel wrote to them; torch.compile knows it from the schema."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def array_kernel(name: str) -> Callable:
    """The native kernel as a function of NumPy arrays, for operations that have one."""
    return getattr(_extension, f"{name}_arrays")


def add_backend(backend: str, namespace: Any, device: str = "cpu") -> None:
    """Make one more namespace of kernels callable by name (tests run emulated GPU code so)."""
    for operation, kernels in _KERNELS_OF.items():
        if kernels and all(hasattr(namespace, k) for k in kernels):
            _KERNELS.update({(k, backend): getattr(namespace, k) for k in kernels})
            if backend not in _BACKENDS[operation, device]:
                _BACKENDS[operation, device] += (backend,)


def fake(name: str, *only: str) -> Callable[[Callable], Callable]:
    """Decorates the function that gives shapes and dtypes of a kernel's results.

    only: the backends it is for, if the others keep other statistics: "native", "triton".
    """

    def decorate(function: Callable) -> Callable:
        if "native" in (only or ("native",)):
            torch.library.register_fake(f"apt::{name}", function, lib=_NATIVE_LIBRARY)
        if name in _TRACED and "triton" in (only or ("triton",)):
            torch.library.register_fake(f"apt_triton::{name}", function, lib=_TRITON_LIBRARY)
        return function

    return decorate


def backends() -> dict[str, Any]:
    """Returns what was built and installed, and which backends each operation uses on each device.

    Returns a dict: `native`, `cuda`, `triton` say in words whether the backend is there and, if
    not, why; `operations` maps an operation to `{device: [backends, the default first]}`.
    """
    if _extension is None:
        cpu = f"absent: {_extension_error}"
    else:
        cpu = f"C++ for the CPU, instruction set {_extension.instruction_set()}"
    if _cuda_extension is None:
        cuda = f"absent: {_cuda_extension_error}"
    else:
        cuda = "built" + ("" if torch.cuda.is_available() else "; no GPU here")
    if _triton is None:
        triton = f"absent: {_triton_error}"
    elif INTERPRETING_TRITON:
        triton = "interpreted on the CPU (TRITON_INTERPRET=1)"
    else:
        triton = "installed" + ("" if torch.cuda.is_available() else "; no GPU here")
    operations: dict[str, dict[str, list[str]]] = {}
    for (operation, device), available in sorted(_BACKENDS.items()):
        operations.setdefault(operation, {})[device] = list(available)
    return {"native": cpu, "cuda": cuda, "triton": triton, "operations": operations}


def empty_cache() -> int:
    """Gives kept memory of the CPU kernels back to the system. Returns its bytes.

    The last freed result of 32 MiB or more is kept for the next call of the loop (Linux only); the
    system takes it back by itself when memory runs short. `torch.cuda.empty_cache` is the
    counterpart of the GPU.
    """
    return _extension.empty_cache() if _extension is not None else 0
