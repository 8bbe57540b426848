"""sup_con_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import reference
from ...ops.contrastive.sup_con_loss import sup_con_loss
from ..common.correct import counted
from ..entry import Benchmark, Op, Rejected, Sample, seeded
from . import similarity
from .similarity import rows, temperature


def _labels(count: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (count,), generator=seeded(seed))


def _clustered(count: int, width: int, dtype: torch.dtype, labels: Tensor) -> Tensor:
    """Rows that lie near the centre of their label."""
    centres = rows(int(labels.max()) + 1 if count else 1, width, torch.float32, seed=20).detach()
    x = 2 * rows(count, width, torch.float32, seed=21).detach() + centres[labels]
    return x.to(dtype).requires_grad_()


@counted
def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x, labels = rows(12, 10, dtype), _labels(12, 4)
    yield Sample("plain", (x, labels))
    for sample in similarity.pairs(dtype):  # two views of every sample
        if len(sample.args[0]) == 1:  # each other's only class: gradients of 0 and a rounding
            continue
        views = torch.cat([t.detach() for t in sample.args])
        views.requires_grad_(any(t.requires_grad for t in sample.args))
        both = torch.arange(len(sample.args[0])).repeat(2)
        yield Sample(f"views_{sample.name}", (views, both), sample.kwargs)
    for count, classes in ((7, 2), (40, 5), (65, 20), (530, 7), (600, 200)):
        labels = _labels(count, classes, seed=count)
        clustered = _clustered(count, 25, dtype, labels)
        sharp = {"temperature": 0.01 if count > 30 else 0.1, "reduction": "none"}
        yield Sample(f"{count}_of_{classes}_sharp", (clustered, labels), sharp)
        mild = {"temperature": temperature(0.5)}
        yield Sample(f"{count}_of_{classes}", (clustered, labels), mild)
    x = rows(9, 6, dtype)
    yield Sample("no_positives", (x, torch.arange(9)), {"temperature": temperature(0.2)})
    yield Sample("no_positives_none", (x, torch.arange(9)), {"reduction": "none"})
    yield Sample("one_label", (x, torch.zeros(9, dtype=torch.long)))
    some_without = torch.tensor([3, 3, 5, 9, 9, 9, 1, 0, 7])
    yield Sample("some_without", (x, some_without))
    alike = similarity.near(torch.ones(9, 6, dtype=dtype), noise=0.05)
    options = {"temperature": 0.01, "reduction": "none"}
    yield Sample("some_without_alike", (alike, some_without), options)
    wild = torch.tensor([-5, 2**62, -5, 2**62, -(2**62), 1, 0, -(2**62), 1])
    yield Sample("any_labels", (x, wild), {"temperature": temperature(0.2)})
    for kind in (torch.int32, torch.int16, torch.uint8):
        yield Sample(f"labels_{kind}", (x, _labels(9, 3).to(kind)))
    yield Sample("strided", (rows(6, 18, dtype).t()[::2], _labels(18, 3)[::2]))
    yield Sample("equal_embeddings", (torch.ones(6, 8, dtype=dtype), _labels(6, 2)))


def of_length(length: int) -> Sample:
    x = rows(length, 9, torch.float32)
    return Sample("", (x, _labels(length, 3)), {"temperature": temperature(0.2)})


def rejected() -> Iterator[Rejected]:
    x, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    yield Rejected("not_a_tensor", ([1.0], labels), {}, TypeError, "features: expected a tensor")
    yield Rejected("one_dimension", (x[0], labels), {}, ValueError, r"features: .*\(N, D\)")
    yield Rejected("views", (x.view(2, 2, 8), labels), {}, ValueError, r"features: .*\(2, 2, 8\)")
    yield Rejected("label_shape", (x, labels[:3]), {}, ValueError, r"labels: .*\(4,\).*\(3,\)")
    yield Rejected("label_type", (x, [0, 0, 1, 1]), {}, TypeError, "labels: expected a tensor")
    yield Rejected(
        "label_dtype", (x, labels.float()), {}, TypeError, "labels: expected dtype int64"
    )
    for bad in (0.0, -1.0, float("nan")):
        options = {"temperature": bad}
        yield Rejected(
            f"temperature_{bad}", (x, labels), options, ValueError, "temperature: .*abov"
        )
    options = {"temperature": torch.ones(4)}
    yield Rejected(
        "temperature_shape", (x, labels), options, ValueError, "temperature: expected sh"
    )
    yield Rejected("reduction", (x, labels), {"reduction": "max"}, ValueError, "reduction: .*'max'")
    options = {"process_group": "gloo"}
    yield Rejected("process_group", (x, labels), options, TypeError, "process_group: expected")


def eager(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    u = similarity.unit(features)
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    logits = (u @ u.T / temperature).masked_fill(itself, -torch.inf)
    positive = (labels.unsqueeze(-1) == labels) & ~itself
    log_probs = logits.log_softmax(-1).masked_fill(~positive, 0)
    count = positive.sum(-1)
    anchors = (count > 0).sum().clamp(min=1)
    return (-log_probs.sum(-1) / count.clamp(min=1)).sum() / anchors


def _metric_learning() -> dict:
    from pytorch_metric_learning.losses import SupConLoss

    def loss(features, labels, temperature):
        return SupConLoss(temperature=temperature)(features, labels)

    return {"pytorch-metric-learning": loss}


def _benchmark(count: int, width: int, classes: int) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        sample = (rows(count, width, dtype), _labels(count, classes))
        return Sample("", sample, {"temperature": 0.1})

    return Benchmark(
        name=f"{count} rows of {classes} labels, D = {width}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # as nt_xent: the products of the pairs, N^2 D flops forward and 3 N^2 D backward, are the
        # larger floor
        bytes_moved=lambda s: s.args[0].nbytes,
        backward_bytes_moved=lambda s: 2 * s.args[0].nbytes,
        flops=lambda s: count * count * width,
        backward_flops=lambda s: 3 * count * count * width,
        peers=(_metric_learning,),
    )


OP = Op(
    name="sup_con_loss",
    function=sup_con_loss,
    reference=reference.sup_con_loss,
    kernels=("sup_con_loss_fwd", "sup_con_loss_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("features",),
    source="Khosla 2020",
    summary="supervised contrastive loss by half of the similarities",
    benchmarks=(_benchmark(4096, 128, 100),),
)
