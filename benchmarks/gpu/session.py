"""One run of at most nine minutes: `python benchmarks/gpu/quick [--only NAME ...] [--on-cpu]`.

It needs the interpreter that is there, with PyTorch: no make, no pip, no network. Phases, each with
its seconds, in this order:
  facts      the machine, the bandwidth of a copy, the rate of a product; the CUDA sources are
             compiled beside it where the package was built without them
  accuracy   every operation forward and backward on every backend, against float64; beside it the
             sides of the rows are called once, so that they are compiled
  rows       our backends, eager PyTorch, torch.compile and the installed peers
  counters   hardware counters of three calls
  device     other streams, captured graphs, more than 2^31 elements
  sanitizer  memcheck and racecheck of the CUDA kernels
  tuning     blocks of the Triton kernels, in the time that is left
Every result is a line of gpu-NAME.jsonl as soon as it is there. A run that is cut loses nothing,
and the next one goes on where it ended; results of other sources or another PyTorch do not count.
gpu-NAME.md is the page, gpu-NAME.log is for looking into faults.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from places import ROOT
from pool import Pool
from records import Records, sources_digest

SECONDS = 540.0  # of one run
PAGE_SECONDS = 5.0  # kept for the page
NO_GPU = """quick: no GPU that PyTorch can use ({reason}).
It needs an NVIDIA GPU, or an AMD one for the Triton kernels. Everything that can be checked without
one is checked by `make test`; `make bench` measures the CPU; --on-cpu rehearses this run."""


@dataclass(frozen=True)
class Phase:
    name: str
    module: str
    seconds: float | None  # None: what is left
    processes: int
    item_seconds: float  # a process that takes longer is replaced
    beside: str | None = None  # a phase that runs at the same time


def phases(cores: int) -> dict[str, Phase]:
    many = max(1, cores - 5)
    listed = (
        Phase("facts", "facts", 20, 1, 20),
        Phase("accuracy", "accuracy", 120, many, 60, beside="warm"),
        Phase("warm", "warm", 120, 3 if cores > 4 else 1, 120),
        Phase("rows", "rows", 160, 1, 60),
        Phase("counters", "counters", 55, 1, 55),
        Phase("device", "device_tests", 70, min(5, cores), 70),
        Phase("sanitizer", "sanitizer", 55, min(5, cores), 55),
        Phase("tuning", "tuning", None, 1, 60),
    )
    return {phase.name: phase for phase in listed}


def why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    return "no device is visible to the driver" if shutil.which("nvidia-smi") else "no driver"


class Session:
    """One run: its time, its files, its phases."""

    def __init__(self, options: argparse.Namespace, begin: float):
        self.options = options
        self.end = begin + options.seconds - PAGE_SECONDS
        self.share = options.seconds / SECONDS
        options.output.mkdir(parents=True, exist_ok=True)
        self.stem = options.output / options.name
        self.records = Records(self.stem.with_suffix(".jsonl"), options.state)
        self.log = self.stem.with_suffix(".log")
        self.environment = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "APT_QUICK_RESULTS": str(self.records.path.resolve()),
            "APT_QUICK_STATE": options.state,
            "OMP_NUM_THREADS": "1",
        }

    def run(self) -> None:
        """All phases, and the page after each."""
        known = phases(len(os.sched_getaffinity(0)))
        beside = {phase.beside for phase in known.values()}
        with self._building():
            for phase in known.values():
                if phase.name in beside:
                    continue
                threads = []
                if phase.beside:
                    threads = [threading.Thread(target=self._phase, args=[known[phase.beside]])]
                for thread in threads:
                    thread.start()
                self._phase(phase)
                for thread in threads:
                    thread.join()
                self.write_page()

    def _phase(self, phase: Phase) -> None:
        begin = time.monotonic()
        budget = self.end - begin if phase.seconds is None else phase.seconds * self.share
        deadline = min(self.end, begin + budget)
        items = self._items(phase)
        pool = Pool(phase.name, self.records, self.log, self.environment)
        cut = pool.run(items, phase.processes, phase.item_seconds, deadline)
        taken, left = time.monotonic() - begin, len(self._undone(phase, items))
        self.records.append(
            "session", phase.name, seconds=round(taken, 1), budget=round(budget, 1), left=left,
            cut=cut,
        )  # fmt: skip
        print(f"{phase.name}: {taken:.0f} s of {budget:.0f}, {left} items left", flush=True)

    def _items(self, phase: Phase) -> list[str]:
        """What is to be done, first what was never begun."""
        items = importlib.import_module(phase.module).items(self.options.only)
        if phase.name == "accuracy" and self.options.samples is not None:
            items = [item for item in items if int(item.split("|")[-1]) < self.options.samples]
        cut = self.records.cut(phase.name)
        return sorted(self._undone(phase, items), key=lambda item: item in cut)

    def _undone(self, phase: Phase, items: list[str]) -> list[str]:
        finished = self.records.finished(phase.name)
        return [item for item in items if item not in finished]

    @contextlib.contextmanager
    def _building(self):
        """The CUDA sources are compiled while the first phases run."""
        if self.options.on_cpu:
            yield
            return
        command = [sys.executable, str(Path(__file__).with_name("cuda_build.py"))]
        with self.log.open("ab") as log:
            build = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **self.environment},
            )  # fmt: skip
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(build.pid, signal.SIGKILL)

    def write_page(self) -> None:
        import page

        self.stem.with_suffix(".md").write_text(page.text(self.records.read()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--samples", type=int, help="of one operation and dtype, at most")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--on-cpu", action="store_true", help="rehearse the run without a GPU")
    options = parser.parse_args()
    from apt_kernels.registry import OPS

    unknown = set(options.only) - set(OPS)
    if unknown:
        parser.error(f"--only: expected names among {sorted(OPS)}, got {sorted(unknown)}")
    return options


def main() -> int:
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers end with the pool
    options = _arguments()
    import torch

    if options.on_cpu:
        os.environ["APT_QUICK_ON_CPU"] = "1"
        machine = f"cpu-{platform.machine()}"
    elif torch.cuda.is_available():
        machine = f"gpu-{torch.cuda.get_device_name()}"
    else:
        print(NO_GPU.format(reason=why_no_gpu()), file=sys.stderr)
        return 2
    options.name = re.sub(r"\W+", "-", machine.lower()).strip("-")
    options.state = f"{sources_digest()} torch {torch.__version__}"
    session = Session(options, begin)
    try:
        session.run()
    finally:
        session.write_page()
    print(f"wrote {session.stem}.md, .jsonl and .log")
    return 0
