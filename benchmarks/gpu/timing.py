"""Milliseconds of a call on the GPU, from its events; on the processor in a rehearsal.

The second-level cache is written over before every repetition. A call of less than `TINY`
milliseconds is also captured in a graph and timed as its replay: otherwise Python's own time
between the launches would be measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apt_kernels.commands import measure
from places import device

TINY = 1.0
MOST = 100
FLUSHED_BYTES = 2**28


def of(run: Callable[[], object], seconds: float) -> dict:
    """Returns median and quantiles in `ms`; `launched_ms` beside it where a graph was timed."""
    if device() == "cpu":
        return _as_values(measure.alternate({"it": run}, seconds)["it"])
    run()
    once = _events(run, 1)[0]
    least = 3 if once < 1e3 else 1
    count = max(least, min(MOST, int(1e3 * seconds / max(once, 1e-3))))
    times = _events(run, count)
    found = _as_values(times)
    if found["ms"] >= TINY:
        return found
    try:
        graph = captured(run)
    except RuntimeError as error:
        return {**found, "graph": f"not captured: {str(error).splitlines()[0][:200]}"}
    replayed = _as_values(_events(graph.replay, count))
    return {**replayed, "launched_ms": found["ms"], "graph": "replayed"}


def _as_values(times: list[float]) -> dict:
    low, middle, high = measure.quantiles(times)
    return {"ms": middle, "ms_p20": low, "ms_p80": high, "repetitions": len(times)}


def _events(run: Callable[[], object], count: int) -> list[float]:
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(count):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The launches of a call, after three calls on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
