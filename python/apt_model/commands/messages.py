"""The messages of the commands, on stderr."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Writes one message."""
    print(f"apt-model: {message}", file=sys.stderr)
