"""Processes that take items of a phase from a queue, until all are done or the time is over.

A worker (worker.py) reads an item a line from its input and writes lines of JSON to its output:
`{"ready": true}` once, results, and `{"finished": ITEM}`. A worker that dies or takes too long
loses its item, which is recorded, and is replaced; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from records import Records

WORKER = Path(__file__).with_name("worker.py")
START_SECONDS = 120  # to import PyTorch and to reach the GPU, on a busy machine


@dataclass
class Worker:
    process: subprocess.Popen
    item: str | None = None
    since: float = field(default_factory=time.monotonic)
    ready: bool = False
    text: bytes = b""

    def give(self, item: str) -> None:
        self.item, self.since = item, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died: the end of its output says so
            self.process.stdin.write(item.encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Runs the items of one phase."""

    def __init__(self, phase: str, records: Records, log: Path, environment: dict[str, str]):
        self.phase, self.records, self.log = phase, records, log
        self.environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []

    def run(
        self, items: list[str], processes: int, item_seconds: float, deadline: float
    ) -> list[str]:
        """Returns the items that were running at the deadline (of `time.monotonic`)."""
        queue = deque(items)
        try:
            for _ in range(min(processes, len(queue))):
                self._start()
            while self.workers and time.monotonic() < deadline:
                for key, _ in self.selector.select(timeout=0.2):
                    self._listen(key.data, queue)
                self._end_those_that_hang(queue, item_seconds)
            return [worker.item for worker in self.workers if worker.item is not None]
        finally:
            for worker in list(self.workers):
                self._remove(worker)

    def _start(self) -> None:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), self.phase], env=self.environment, stderr=log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        worker = Worker(process)
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker: Worker) -> None:
        self.selector.unregister(worker.process.stdout)
        worker.kill()
        self.workers.remove(worker)

    def _listen(self, worker: Worker, queue: deque[str]) -> None:
        data = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not data:
            self._lose(worker, queue, f"ended with status {worker.process.wait()}")
            return
        *lines, worker.text = (worker.text + data).split(b"\n")
        for line in map(json.loads, lines):
            if "ready" in line or "finished" in line:
                worker.ready, worker.item = True, None
                if "finished" in line:
                    self.records.append(self.phase, line["finished"], finished=True)
                self._next(worker, queue, line.get("leaving", False))
            else:
                self.records.append(self.phase, **line)

    def _next(self, worker: Worker, queue: deque[str], leaving: bool) -> None:
        if queue and not leaving:
            worker.give(queue.popleft())
            return
        self._remove(worker)
        if queue:
            self._start()

    def _end_those_that_hang(self, queue: deque[str], item_seconds: float) -> None:
        for worker in list(self.workers):
            limit = item_seconds if worker.ready else START_SECONDS
            if time.monotonic() - worker.since > limit:
                self._lose(worker, queue, f"took more than {limit:.0f} s")

    def _lose(self, worker: Worker, queue: deque[str], why: str) -> None:
        self._remove(worker)
        item = worker.item or "start of a process"
        self.records.append(self.phase, item, status="lost", why=why, finished=worker.ready)
        if worker.ready and queue:  # one that never came up would not come up again
            self._start()
