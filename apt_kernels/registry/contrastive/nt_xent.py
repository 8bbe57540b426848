"""nt_xent: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.contrastive.nt_xent import nt_xent
from ..common.correct import counted
from ..entry import Benchmark, Op, Rejected, Sample
from . import similarity
from .similarity import near, rows, temperature

ROW_BLOCK = 256  # the fastest of 256, 512 and 1024


@counted
def samples(dtype: torch.dtype) -> Iterator[Sample]:
    yield from similarity.pairs(dtype)
    # views of another sample in the same and in another tile than the positive
    for count in (255, 256, 257, 600):
        x = rows(count, 9, dtype, seed=count)
        kwargs = {"temperature": 0.5, "reduction": "none"}
        yield Sample(f"{count}_samples", (x, near(x)), kwargs)
        kwargs = {"temperature": temperature(0.5)}
        yield Sample(f"{count}_samples_mean", (x, near(x)), kwargs)


def of_length(length: int) -> Sample:
    x = rows(length, 9, torch.float32)
    return Sample("", (x, near(x)), {"temperature": temperature(0.2)})


def rejected() -> Iterator[Rejected]:
    yield from similarity.rejected("z1", "z2")
    x, y = torch.randn(4, 8), torch.randn(6, 8)
    yield Rejected("counts", (x, y), {}, ValueError, r"z2: expected shape \(4, 8\)")


def eager(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    u = similarity.unit(torch.cat([z1, z2]))
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    logits = (u @ u.T / temperature).masked_fill(itself, -torch.inf)
    labels = torch.arange(len(u), device=u.device).roll(len(z1))
    return F.cross_entropy(logits, labels)


def _products(backward: bool):
    """The matrix products alone, of the pairs above the diagonal, in blocks of rows.

    Backward they are formed again, and each enters the gradients of its row and of its column.
    """

    def run(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
        u = torch.cat([z1, z2])
        grad, tiles = torch.empty_like(u), u.new_empty(ROW_BLOCK * len(u))
        for _ in range(1 + backward):
            for row in range(0, len(u), ROW_BLOCK):
                block, above = u[row : row + ROW_BLOCK], u[row:]
                tile = tiles[: len(block) * len(above)].view(len(block), len(above))
                torch.mm(block, above.T, out=tile)
        if backward:
            for row in range(0, len(u), ROW_BLOCK):
                block, above = u[row : row + ROW_BLOCK], u[row:]
                tile = tiles[: len(block) * len(above)].view(len(block), len(above))
                torch.mm(tile, above, out=grad[row : row + ROW_BLOCK])
                torch.mm(tile.T, block, out=grad[row:])
        return grad

    return run


def _lightly() -> dict:
    # Its other losses import torchvision, which not every PyTorch has beside it.
    absent = importlib.util.find_spec("torchvision") is None
    stubs = {name: MagicMock() for name in ("torchvision", "torchvision.ops") if absent}
    with patch.dict(sys.modules, stubs):
        from lightly.loss import NTXentLoss

    def loss(z1, z2, temperature):
        return NTXentLoss(temperature=temperature)(z1, z2)

    return {"lightly": loss}


def _benchmark(count: int, width: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = rows(count, width, dtype)
        return Sample("", (x, near(x)), {"temperature": 0.07})

    return Benchmark(
        name=f"2 x {count} views, D = {width}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # forward reads the rows; backward reads them and writes their gradients. The products of
        # the pairs of 2 N rows, 4 N^2 D flops forward and 12 N^2 D backward, are the larger floor.
        bytes_moved=lambda s: 2 * s.args[0].nbytes,
        backward_bytes_moved=lambda s: 4 * s.args[0].nbytes,
        flops=lambda s: 4 * count * count * width,
        backward_flops=lambda s: 12 * count * count * width,
        peers=(_lightly,),
        floor={"its products": _products(backward=False)},
        backward_floor={"its products": _products(backward=True)},
        devices=devices,
    )


OP = Op(
    name="nt_xent",
    function=nt_xent,
    reference=reference.nt_xent,
    kernels=("nt_xent_fwd", "nt_xent_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("z1", "z2"),
    source="Chen 2020",
    summary="SimCLR's loss by half of the similarities of both views",
    benchmarks=(
        _benchmark(64, 128),
        _benchmark(4096, 128),
        _benchmark(32768, 256, devices=("cuda",)),
        _benchmark(32768, 512, devices=("cuda",)),
        _benchmark(32768, 768, devices=("cuda",)),
    ),
)
