"""siglip_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.contrastive.siglip_loss import siglip_loss
from ..common.correct import counted
from ..entry import Benchmark, Op, Rejected, Sample
from . import similarity
from .similarity import near, rows, temperature


@counted
def samples(dtype: torch.dtype) -> Iterator[Sample]:
    yield from similarity.pairs(dtype)
    for bias in (-10.0, -0.3, 4.0, -50.0):
        for sample in list(similarity.pairs(dtype))[:8]:
            sharp = sample.kwargs.get("temperature") == 0.01  # see similarity.pairs
            kwargs = {**sample.kwargs, "logit_bias": bias if sharp else temperature(bias)}
            yield Sample(f"bias_{bias}_{sample.name}", sample.args, kwargs)
    x = rows(13, 7, dtype, seed=10)
    keys = near(x, count=29, first=9)
    for offset in (0, 9, 16):
        yield Sample(f"label_offset_{offset}", (x, keys), {"label_offset": offset})
    many = rows(530, 25, dtype, seed=11)
    kwargs = {"label_offset": 60, "temperature": temperature(0.5), "logit_bias": temperature(-5.0)}
    yield Sample("label_offset_several_tiles", (many, near(many, count=611, first=60)), kwargs)
    frozen = (x.detach(), keys.detach()[9:22])
    yield Sample("bias_alone", frozen, {"logit_bias": temperature(-10.0)})


def of_length(length: int) -> Sample:
    x = rows(length, 9, torch.float32)
    kwargs = {"temperature": temperature(0.2), "logit_bias": temperature(-3.0)}
    return Sample("", (x, near(x)), kwargs)


def rejected() -> Iterator[Rejected]:
    yield from similarity.rejected("query", "key")
    x, y = torch.randn(4, 8), torch.randn(6, 8)
    for offset in (-1, 3):
        options = {"label_offset": offset}
        yield Rejected(f"offset_{offset}", (x, y), options, ValueError, "label_offset: .*M - N = 2")
    options = {"logit_bias": float("nan")}
    yield Rejected("bias_nan", (x, y), options, ValueError, "logit_bias: expected a finite number")
    options = {"logit_bias": "0"}
    yield Rejected("bias_type", (x, y), options, TypeError, "logit_bias: expected a number")
    options = {"logit_bias": torch.zeros(4)}
    yield Rejected("bias_shape", (x, y), options, ValueError, r"logit_bias: .*\(\).*\(4,\)")


def eager(query: Tensor, key: Tensor, temperature: float, logit_bias: float) -> Tensor:
    logits = similarity.unit(query) @ similarity.unit(key).T / temperature + logit_bias
    signs = 2 * torch.eye(len(query), device=query.device, dtype=query.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(query)


def _open_clip() -> dict:
    from open_clip.loss import SigLipLoss

    siglip = SigLipLoss()

    def loss(query, key, temperature, logit_bias):
        query, key = similarity.unit(query), similarity.unit(key)
        return siglip(query, key, 1 / temperature, logit_bias)

    return {"open_clip": loss}


def _benchmark(count: int, width: int) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = rows(count, width, dtype)
        return Sample("", (x, near(x)), {"temperature": 0.1, "logit_bias": -10.0})

    return Benchmark(
        name=f"{count} x {count}, D = {width}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # as info_nce: the products of all pairs are the larger floor
        bytes_moved=lambda s: 2 * s.args[0].nbytes,
        backward_bytes_moved=lambda s: 4 * s.args[0].nbytes,
        flops=lambda s: 2 * count * count * width,
        backward_flops=lambda s: 6 * count * count * width,
        peers=(_open_clip,),
    )


OP = Op(
    name="siglip_loss",
    function=siglip_loss,
    reference=reference.siglip_loss,
    kernels=("siglip_loss_fwd", "siglip_loss_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("query", "key"),
    source="Zhai 2023",
    summary="the sigmoid loss of all pairs without their matrix",
    benchmarks=(_benchmark(4096, 128),),
)
