"""Check every operation, forward and backward, against float64 on every device here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import calls
from ..dispatch import backends
from ..registry import OPS, Sample
from .progress import Progress

LARGEST = 4_000_000  # elements of a call: the float64 reference of a larger one takes seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="only these operations")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="time to spend; 0: until all is checked"
    )


class Case(NamedTuple):
    """One call to check."""

    operation: str
    device: str
    backend: str
    dtype: torch.dtype
    sample: Sample

    def reproducer(self) -> str:
        """A command that runs this call alone."""
        return (
            'python -c "import torch; from apt_kernels import calls, registry; '
            f"op = registry.OPS['{self.operation}']; calls.assert_as_the_reference(op, "
            f"op.sample('{self.sample.name}', {self.dtype}), '{self.device}', '{self.backend}')\""
        )


def run(options: argparse.Namespace) -> int:
    cases = in_turn(selected(options.op))
    progress = Progress(len(cases), "calls", options.seconds)
    failed, begin = [], time.monotonic()
    for done, case in enumerate(cases):
        if options.seconds and time.monotonic() - begin > options.seconds:
            break
        progress.show(done, f"{case.operation} {case.device} {case.backend}")
        error = failure(case)
        if error:
            failed.append(case)
            progress.clear()
            print(f"FAILED {case.operation}: {error}\n  {case.reproducer()}", flush=True)
    else:
        done = len(cases)
    progress.clear()
    seen = {(c.operation, c.device, c.backend) for c in cases[:done]}
    whole = "" if done == len(cases) else "; --seconds 0 checks all"
    print(
        f"{done} of {len(cases)} calls checked against float64 in {time.monotonic() - begin:.0f} s "
        f"({len(seen)} operations on their devices and backends), {len(failed)} failed{whole}"
    )
    return 1 if failed or not done else 0


def selected(names: list[str]) -> list[list[Case]]:
    """The cases of each operation, device, backend and dtype."""
    unknown = sorted(set(names) - set(OPS))
    if unknown:
        raise ValueError(f"--op: expected names among {sorted(OPS)}, got {unknown}")
    return [list(cases) for name in names or OPS for cases in _cases_of(name)]


def _cases_of(name: str) -> Iterator[Iterator[Case]]:
    op = OPS[name]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        available = backends()["operations"][name][device]
        for backend in [b for b in available if b != "reference"] or available:
            for dtype in op.dtypes:
                has_float64 = device == "cpu" and backend in ("native", "reference")
                if dtype != torch.float64 or has_float64:
                    yield (
                        Case(name, device, backend, dtype, sample)
                        for sample in op.samples(dtype)
                        if sum(t.numel() for t in calls.tensors(sample)) <= LARGEST
                    )


def in_turn(groups: list[list[Case]]) -> list[Case]:
    """One case of every group, then the next of every group: little time still sees them all."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def failure(case: Case) -> str:
    """The first line of the error of this call, or nothing."""
    try:
        calls.assert_as_the_reference(OPS[case.operation], case.sample, case.device, case.backend)
    except Exception as error:  # whatever it is, the other calls are checked too
        message = str(error).strip().partition("\n")[0] or "no message"
        return f"{type(error).__name__}: {message}"
    return ""
