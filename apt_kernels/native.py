"""Loads the compiled kernels, and says why where they are not there or cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch

# The stable ABI that the libraries are built on; CMakeLists.txt and setup.py read this line.
OLDEST_PYTORCH = "2.11"

WHAT_TO_DO = (
    "Triton and the reference do the work. Install apt_kernels again beside this PyTorch, or set "
    "APT_KERNELS_NATIVE=0 when you install it"
)


def load(module: str, if_missing: str) -> tuple[Any, str]:
    """Imports a compiled module of this package.

    Args:
        module: its name, as `_C`.
        if_missing: the reason to give where it was not built.

    Returns:
        The module and "", or None and the reason. A module that was built and cannot be loaded is
        warned of too: its kernels are missed by nobody else.
    """
    name = f"{__package__}.{module}"
    built = importlib.util.find_spec(name) is not None
    if is_too_old(torch.__version__):
        reason = f"PyTorch {OLDEST_PYTORCH} or newer is needed, this is {torch.__version__}"
        if built:
            _warn(module, reason)
        return None, reason
    if not built:
        return None, if_missing
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        reason = (
            f"built for PyTorch {OLDEST_PYTORCH} and newer, cannot be loaded with "
            f"{torch.__version__}: {error}"
        )
        _warn(module, reason)
        return None, reason


def is_too_old(version: str) -> bool:
    major, minor = version.split("+")[0].split(".")[:2]
    return (int(major), int(minor)) < tuple(map(int, OLDEST_PYTORCH.split(".")))


def _warn(module: str, reason: str) -> None:
    message = f"apt_kernels.{module} is left out: {reason}. {WHAT_TO_DO}."
    warnings.warn(message, RuntimeWarning, stacklevel=4)
