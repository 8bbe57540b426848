"""Blocks and warps of the Triton kernels, tried one after another on this GPU.

A setting is the name in `apt_kernels.triton` that decides them; every candidate replaces it for
the time of a measurement. The report shows the candidates beside the one in the sources; whoever
changes the sources changes that name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import measure
from apt_kernels.registry import OPS, Benchmark
from run import on_device, passes


@dataclass(frozen=True)
class Setting:
    operation: str
    place: str  # module:name, below apt_kernels.triton
    candidates: dict[str, Any]  # by label
    applies: Callable[[str], bool] = lambda dtype: True  # to which dtypes


def _constant(*value: int) -> Callable:
    return lambda *args, **kwargs: value


def _blocks(*pairs: tuple[int, int]) -> dict[str, Callable]:
    return {f"{block} columns, {warps} warps": _constant(block, warps) for block, warps in pairs}


def _tiles(*choices: tuple[int, int, int, int, int]) -> dict[str, Any]:
    from apt_kernels.triton.head.launch import Tiles

    return {
        f"{m} x {n} x {k}, {warps} warps, {stages} stages": Tiles(m, n, k, warps, stages)
        for m, n, k, warps, stages in choices
    }


def _settings() -> Iterator[Setting]:
    rows = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    pairs = ((256, 1), (256, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))
    yield Setting("token_logprobs", "logprobs.token_logprobs:_block", _blocks(*rows))
    for operation in ("dpo_loss", "bradley_terry_loss"):
        yield Setting(operation, f"preference.{operation}:pair_block", _blocks(*pairs))
    half = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4))
    single = ((64, 64, 16, 8, 3), (64, 64, 32, 4, 3), (128, 64, 16, 8, 3), (64, 128, 16, 8, 3))
    for operation in ("linear_token_logprobs", "linear_cross_entropy"):
        yield Setting(operation, "head.launch:HALF_TILES", _tiles(*half), lambda d: d != "float32")
        yield Setting(
            operation, "head.launch:FLOAT_TILES", _tiles(*single), lambda d: d == "float32"
        )


try:
    SETTINGS = tuple(_settings())
except ImportError:  # no Triton
    SETTINGS = ()


def _time(bench: Benchmark, operation: str, dtype, device: str, seconds: float) -> float:
    op = OPS[operation]
    sample = on_device(bench.make(dtype), device)
    runs = passes(op.function, sample, bench.backward)
    name = list(runs)[-1]
    return measure.quantiles(measure.alternate({name: runs[name]}, seconds)[name])[1]


def table(setting: Setting, device: str, seconds: float) -> str:
    """Markdown: milliseconds of each candidate on every shape, the fastest in bold."""
    module_name, name = setting.place.split(":")
    module = importlib.import_module(f"apt_kernels.triton.{module_name}")
    cases = [
        (bench, dtype)
        for bench in OPS[setting.operation].benchmarks
        for dtype in bench.dtypes
        if device in bench.devices and setting.applies(str(dtype).removeprefix("torch."))
    ]
    columns = [f"{b.name}, {str(d).removeprefix('torch.')}" for b, d in cases]
    lines = [
        f"**{setting.operation}** ({setting.place})\n",
        f"| blocks | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    choices = {"as in the sources": getattr(module, name), **setting.candidates}
    times: dict[str, list[float | None]] = {}
    for label, choice in choices.items():
        with mock.patch.object(module, name, choice):
            times[label] = [_attempt(setting, *case, device, seconds) for case in cases]
    best = [
        min((t for t in column if t is not None), default=None)
        for column in zip(*times.values(), strict=True)
    ]
    for label, row in times.items():
        cells = [
            "does not run" if t is None else f"**{t:.4g}**" if t == b else f"{t:.4g}"
            for t, b in zip(row, best, strict=True)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _attempt(setting: Setting, bench, dtype, device: str, seconds: float) -> float | None:
    """None where a candidate needs more shared memory or registers than there are."""
    from triton.runtime.errors import OutOfResources

    try:
        return _time(bench, setting.operation, dtype, device, seconds)
    except OutOfResources:
        return None
