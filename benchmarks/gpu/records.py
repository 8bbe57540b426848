"""The results of a run: one JSON object a line, written as it comes.

Several processes append to the file at the same time. A line is written by one call of the system,
so a process that is killed leaves whole lines behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

SOURCES = ("apt_kernels", "csrc", "benchmarks/gpu", "tests/gpu")


def sources_digest() -> str:
    """Twelve characters that change with every file that decides about a result."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Records:
    """The file of results, and the state of the sources and of PyTorch that a run belongs to."""

    path: Path
    state: str

    def append(self, phase: str, item: str, **values) -> None:
        """Adds a result. `finished=True` says that the item needs no further run."""
        line = {"phase": phase, "item": item, **values, "state": self.state, "at": time.time()}
        text = (json.dumps(line) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text)
        finally:
            os.close(file)

    def read(self) -> list[dict]:
        """All results of this state; results of other sources stay in the file, unread."""
        return [line for line in self._lines() if line.get("state") == self.state]

    def _lines(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the machine went down in the middle of a line
                continue

    def finished(self, phase: str) -> set[str]:
        """Items that need no further run. A tool that was absent may be there the next time."""
        lines = [r for r in self.read() if r["phase"] == phase]
        absent = {r["item"] for r in lines if r.get("status") == "absent"}
        return {r["item"] for r in lines if r.get("finished")} - absent

    def cut(self, phase: str) -> set[str]:
        """Items that were running when the time of their phase was over."""
        ends = [r for r in self.read() if r["phase"] == "session" and r["item"] == phase]
        return {item for end in ends for item in end.get("cut", ())}
