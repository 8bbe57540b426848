"""info_nce: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.contrastive.info_nce import info_nce
from ..common.correct import counted
from ..entry import Benchmark, Op, Rejected, Sample
from . import similarity
from .similarity import near, rows, temperature


@counted
def samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in similarity.pairs(dtype):
        yield sample
        yield Sample(f"symmetric_{sample.name}", sample.args, {"symmetric": True, **sample.kwargs})
        query, key = sample.args
        if len(query) and sample.name != "nearly_equal":  # e^-70: beyond the oracle
            others = rows(29, query.shape[1], dtype, seed=9)
            kwargs = {"negatives": others, **sample.kwargs}
            yield Sample(f"negatives_{sample.name}", (query, key), kwargs)

    x = rows(13, 7, dtype, seed=10)
    keys = near(x, count=29, first=9)
    for offset in (0, 9, 16):
        yield Sample(f"label_offset_{offset}", (x, keys), {"label_offset": offset})
    options = {"temperature": 0.01, "reduction": "none", "label_offset": 9}
    yield Sample("label_offset_none", (x, keys), options)
    many = rows(530, 25, dtype, seed=11)
    options = {"temperature": 0.5, "reduction": "none", "label_offset": 60}
    yield Sample("label_offset_several_tiles", (many, near(many, count=611, first=60)), options)
    yield Sample("more_rows_than_tiles", (many[:70], near(many)), {"label_offset": 448})
    yield Sample("no_keys", (rows(0, 3, dtype), rows(4, 3, dtype)), {"label_offset": 2})

    key = near(x, seed=12)
    queue = rows(7, 31, dtype, seed=13).detach()
    sharp = {"temperature": 0.01, "reduction": "none"}
    mild = {"temperature": temperature(0.3)}
    yield Sample("queue", (x, key.detach()), {"negatives": queue.t(), **mild})
    yield Sample("queue_sharp", (x, key), {"negatives": queue.t(), **sharp})
    yield Sample("queue_slice", (x, key), {"negatives": rows(8, 40, dtype)[1:, ::2].t(), **mild})
    yield Sample("queue_of_float32", (x, key), {"negatives": queue.float().t(), **sharp})
    yield Sample("one_negative", (x, key), {"negatives": rows(1, 7, dtype, seed=14), **mild})
    yield Sample("no_negatives", (x, key), {"negatives": rows(0, 7, dtype), **mild})
    yield Sample(
        "no_rows_negatives", (rows(0, 7, dtype), rows(0, 7, dtype)), {"negatives": queue.t()}
    )
    kwargs = {"negatives": rows(700, 25, dtype, seed=15), "temperature": temperature(0.2)}
    yield Sample("queue_of_several_tiles", (many, near(many)), kwargs)
    kwargs = {"negatives": rows(9, 7, dtype), "normalize": False, "reduction": "sum", **mild}
    yield Sample("negatives_unnormalised", (x, key), kwargs)


def of_length(length: int) -> Sample:
    x = rows(length, 9, torch.float32)
    return Sample("", (x, near(x)), {"temperature": temperature(0.2), "symmetric": True})


def rejected() -> Iterator[Rejected]:
    yield from similarity.rejected("query", "key")
    x, y = torch.randn(4, 8), torch.randn(6, 8)
    for offset in (-1, 3):
        options = {"label_offset": offset}
        yield Rejected(f"offset_{offset}", (x, y), options, ValueError, "label_offset: .*M - N = 2")
    yield Rejected("few_keys", (y, x), {}, ValueError, "label_offset: expected")
    options = {"label_offset": 1.0}
    yield Rejected("offset_type", (x, y), options, TypeError, "label_offset: expected an integer")
    yield Rejected("symmetric", (x, y), {"symmetric": True}, ValueError, "key: expected 4 rows")
    options = {"negatives": y}
    yield Rejected("negatives_rows", (x, y), options, ValueError, "key: expected 4 rows with neg")
    options = {"negatives": y, "symmetric": True}
    yield Rejected("negatives_symmetric", (x, x), options, ValueError, "negatives: expected None")
    options = {"negatives": y[:, :5]}
    yield Rejected("negatives_width", (x, x), options, ValueError, r"negatives: .*\(N, 8\)")
    options = {"negatives": [1.0]}
    yield Rejected("negatives_type", (x, x), options, TypeError, "negatives: expected a tensor")


def eager(query: Tensor, key: Tensor, temperature: float, symmetric: bool) -> Tensor:
    logits = similarity.unit(query) @ similarity.unit(key).T / temperature
    labels = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.T, labels)) / 2 if symmetric else loss


def _open_clip() -> dict:
    from open_clip.loss import ClipLoss

    clip = ClipLoss()

    def loss(query, key, temperature, symmetric):
        return clip(similarity.unit(query), similarity.unit(key), 1 / temperature)

    return {"open_clip": loss}


def _benchmark(count: int, width: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = rows(count, width, dtype)
        return Sample("", (x, near(x)), {"temperature": 0.07, "symmetric": True})

    return Benchmark(
        name=f"symmetric {count} x {count}, D = {width}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # forward reads the rows; backward reads them and writes their gradients. The products of
        # all pairs, 2 N^2 D flops forward and 6 N^2 D backward, are the larger floor.
        bytes_moved=lambda s: 2 * s.args[0].nbytes,
        backward_bytes_moved=lambda s: 4 * s.args[0].nbytes,
        flops=lambda s: 2 * count * count * width,
        backward_flops=lambda s: 6 * count * count * width,
        peers=(_open_clip,),
        devices=devices,
    )


OP = Op(
    name="info_nce",
    function=info_nce,
    reference=reference.info_nce,
    kernels=("info_nce_fwd", "info_nce_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("query", "key", "negatives"),
    source="van den Oord 2018, Radford 2021",
    summary="CLIP's and MoCo's loss without the matrix of similarities",
    benchmarks=(
        _benchmark(64, 128),
        _benchmark(4096, 128),
        _benchmark(4096, 768),
        _benchmark(32768, 512, devices=("cuda",)),
        _benchmark(65536, 512, devices=("cuda",)),
    ),
)
