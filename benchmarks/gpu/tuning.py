"""Blocks and warps of the Triton kernels, tried one after another on this GPU.

A setting is the name in `apt_kernels.triton` that decides them; every candidate replaces it for the
time of a measurement. The page shows the candidates beside the choice of the sources; whoever
changes the sources changes that name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import calling
import targets
import timing
from apt_kernels.commands.comparison import passes
from faults import failure
from places import device

AS_IT_IS = "as in the sources"
NO_TRITON = "Triton is not installed"
SECONDS = 0.3


@dataclass(frozen=True)
class Setting:
    operation: str
    place: str  # module:name, below apt_kernels.triton
    candidates: dict[str, Any]  # by label

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.place}"

    def module(self):
        return importlib.import_module(f"apt_kernels.triton.{self.place.split(':')[0]}")

    def chosen(self) -> Any:
        return getattr(self.module(), self.place.split(":")[1])


def _constant(value: Any) -> Callable:
    return lambda *args, **kwargs: value


def _blocks(*pairs: tuple[int, int]) -> dict[str, Callable]:
    return {f"{block} columns, {warps} warps": _constant((block, warps)) for block, warps in pairs}


def _head_tiles(*choices: tuple[int, int, int, int, int]) -> dict[str, Any]:
    from apt_kernels.triton.head.launch import Tiles

    return {
        f"{m} x {n} x {k}, {warps} warps, {stages} stages": Tiles(m, n, k, warps, stages)
        for m, n, k, warps, stages in choices
    }


def _similarity_tiles(*choices: tuple[int, int, int, int, int, int]) -> dict[str, Callable]:
    from apt_kernels.triton.contrastive.similarity import Tiles

    return {
        f"{m} x {n} x {k}, part {part}, {warps} warps, {stages} stages": _constant(
            Tiles(m, n, k, part, warps, stages)
        )
        for m, n, k, part, warps, stages in choices
    }


def settings() -> Iterator[Setting]:
    """The tiles of heads and similarities, then the blocks of rows and pairs."""
    half = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 4))
    yield Setting("linear_token_logprobs", "head.launch:HALF_TILES", _head_tiles(*half))
    scores = ((128, 128, 64, 128, 8, 3), (64, 64, 64, 128, 4, 3), (64, 64, 32, 128, 4, 4))
    yield Setting("nt_xent", "contrastive.similarity_softmax:tiles", _similarity_tiles(*scores))
    slopes = ((64, 64, 64, 128, 8, 2), (128, 32, 64, 128, 8, 2), (64, 32, 64, 256, 8, 2))
    yield Setting("nt_xent", "contrastive.similarity_gradient:tiles", _similarity_tiles(*slopes))
    rows = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    yield Setting("token_logprobs", "logprobs.token_logprobs:_block", _blocks(*rows))
    pairs = ((256, 1), (512, 4), (1024, 4), (1024, 8), (2048, 8))
    yield Setting("dpo_loss", "preference.dpo_loss:pair_block", _blocks(*pairs))


def items(only: list[str]) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return [NO_TRITON]
    return [
        f"{setting.name}|{label}|{shape}"
        for setting in settings()
        if not only or setting.operation in only
        for shape in targets.shapes(setting.operation)[:1]
        for label in (AS_IT_IS, *setting.candidates)
    ]


def measure(item: str) -> Iterator[dict]:
    if item == NO_TRITON:
        yield {"status": "absent", "why": item}
        return
    name, label, shape = item.split("|")
    setting = next(s for s in settings() if s.name == name)
    bench = targets.benchmark(setting.operation, shape)
    sample = calling.sample_of(bench, targets.dtype_of(setting.operation))
    backend = "triton" if device() == "cuda" else calling.backends(setting.operation)[0]
    function = calling.ours(setting.operation, backend)
    run = list(passes(function, sample, bench.backward).values())[-1]
    choice = setting.chosen() if label == AS_IT_IS else setting.candidates[label]
    about = {"setting": name, "choice": label, "shape": shape}
    with mock.patch.object(setting.module(), setting.place.split(":")[1], choice):
        try:
            yield {**about, "status": "measured", **timing.of(run, SECONDS)}
        except Exception as error:  # more shared memory or registers than there are
            yield {**about, **failure(error)}
