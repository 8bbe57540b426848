"""Time and memory of a call, measured where a user would notice them."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..dispatch import empty_cache

_LIBC = ctypes.CDLL(None)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that the process (or the GPU) needed at its peak beyond what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    empty_cache()
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _timed(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _repeat(run: Callable[[], object], count: int) -> object:
    result = None
    for _ in range(count):
        result = run()
    return result


def alternate(
    runs: dict[str, Callable[[], object]], seconds: float, most: int = 200, least: int = 5
) -> dict[str, list[float]]:
    """Times every function in turn, round after round, so that drift hits all of them alike.

    Returns:
        Milliseconds of every round, by name; at least `least` rounds, then as many
        as fit in `seconds`.
        On a GPU: of every repetition of triton.testing.do_bench (device time, cold second-level
        cache), in three rounds.
    """
    if torch.cuda.is_available():
        return _alternate_on_gpu(runs, seconds)
    repeat = {}
    for name, run in runs.items():  # short calls are repeated inside one measurement
        took = _timed(run)
        for _ in range(2 if took < 1 else 0):
            took = _timed(run)
        repeat[name] = max(1, min(1000, int(0.002 / max(took, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() - begin < seconds):
        rounds += 1
        for name, run in runs.items():
            times[name].append(_timed(lambda r=run, c=repeat[name]: _repeat(r, c)) * 1e3)
            times[name][-1] /= repeat[name]
    return times


def _alternate_on_gpu(
    runs: dict[str, Callable[[], object]], seconds: float, rounds: int = 3
) -> dict[str, list[float]]:
    from triton.testing import do_bench

    share = 1e3 * seconds / (rounds * len(runs))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += do_bench(run, warmup=share / 4, rep=share, return_mode="all")
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def paired(times: list[float], others: list[float]) -> bool:
    """Whether round i of both was measured at the same time; do_bench repeats short calls more."""
    return len(times) == len(others)


def ratio(slower: list[float], faster: list[float]) -> float:
    """The median over rounds of one side's time divided by the other's in the same round.

    Times of rounds that are not paired give the ratio of both medians.
    """
    if not paired(slower, faster):
        return statistics.median(slower) / statistics.median(faster)
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
