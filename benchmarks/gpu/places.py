"""Where things lie, and on which device a run measures."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-quick"


def device() -> str:
    """The GPU, or the processor in a rehearsal."""
    return "cpu" if os.environ.get("APT_QUICK_ON_CPU") else "cuda"
