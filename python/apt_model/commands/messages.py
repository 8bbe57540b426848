"""The messages of the commands, on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr


def is_main() -> bool:
    """Returns whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Writes one message, in the main process."""
    if is_main():
        print(f"apt-model: {message}", file=sys.stderr)


@contextmanager
def one_voice() -> Iterator[None]:
    """Within this context all processes but the main one write nothing to stderr."""
    with ExitStack() as stack:
        if not is_main():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield
