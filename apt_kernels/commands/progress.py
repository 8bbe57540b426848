"""One line on the terminal that tells how much is done and how long the rest takes."""

from __future__ import annotations

import sys
import time


class Progress:
    """Writes to stderr: a line that is replaced on a terminal, else a line now and then."""

    def __init__(self, total: int, unit: str, most_seconds: float = 0.0) -> None:
        """Starts the clock.

        Args:
            total: how many steps there are.
            unit: the word for them, in the plural.
            most_seconds: after which the work ends in any case; 0 for no such limit.
        """
        self.total, self.unit, self.most_seconds = total, unit, most_seconds
        self.begin = self.shown = time.monotonic()
        self.on_terminal = sys.stderr.isatty()

    def show(self, done: int, what: str) -> None:
        """Tells that `done` steps are finished and that `what` is next."""
        now = time.monotonic()
        if now - self.shown < (0.1 if self.on_terminal else 10) and done:
            return
        self.shown = now
        text = f"{done}/{self.total} {self.unit}, {self._left(done, now)} {what}"
        if self.on_terminal:
            sys.stderr.write(f"\r\x1b[K{text[:110]}")
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _left(self, done: int, now: float) -> str:
        if not done:
            return ""
        left = (now - self.begin) / done * (self.total - done)
        if self.most_seconds:
            left = min(left, self.most_seconds - (now - self.begin))
        left = max(0, round(left))
        return f"{left // 60}:{left % 60:02} left:"

    def clear(self) -> None:
        """Takes the line away."""
        if self.on_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
