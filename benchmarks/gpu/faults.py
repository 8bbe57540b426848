"""How a measurement that raised is recorded."""

from __future__ import annotations


def failure(error: Exception) -> dict[str, str]:
    """The status: memory that is not there, something that is not installed, or a fault."""
    name = type(error).__name__
    kinds = {"OutOfMemoryError": "out of memory", "OutOfResources": "out of resources"}
    kinds |= dict.fromkeys(("ImportError", "ModuleNotFoundError", "BuildError"), "absent")
    lines = str(error).strip().splitlines() or [""]
    return {"status": kinds.get(name, "failed"), "why": f"{name}: {lines[0][:400]}"}


def ends_the_process(error: Exception) -> bool:
    """After a fault of the GPU nothing runs in this process any more."""
    return "CUDA error" in str(error) or "device-side assert" in str(error)
