"""linear_cross_entropy: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ... import reference
from ...ops.logprobs.linear_cross_entropy import linear_cross_entropy
from ..common.correct import counted
from ..common.heads import hidden_and_weight, ids, normal
from ..entry import Benchmark, Op, Rejected, Sample, seeded


@counted
def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def head(*rows: int, features: int = 24, vocab: int = 37, **kwargs):
        return hidden_and_weight(*rows, features=features, vocab=vocab, dtype=dtype, **kwargs)

    def floats(*shape: int, **kwargs) -> torch.Tensor:
        return normal(*shape, dtype=dtype, **kwargs)

    h, w = head(3, 5)
    labels = ids(3, 5, vocab=37)
    bias = floats(37, seed=5).requires_grad_()
    counts = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    some = labels.masked_fill(~counts, -100)
    yield Sample("plain", (h, w, labels))
    yield Sample("ignored", (h, w, some), {"bias": bias})
    yield Sample("sum", (h, w, some), {"reduction": "sum", "bias": bias})
    yield Sample("none", (h, w, some), {"reduction": "none", "bias": bias})
    everything = {"label_smoothing": 0.1, "softcap": 4.0, "logit_scale": 0.7, "bias": bias}
    for reduction in ("mean", "sum", "none"):
        yield Sample(
            f"everything_{reduction}", (h, w, some), {**everything, "reduction": reduction}
        )
        smoothed = {"label_smoothing": 0.2, "logit_scale": 1.3, "reduction": reduction}
        yield Sample(f"smoothed_{reduction}", (h, w, some), smoothed)
    yield Sample("smoothed_none_bias", (h, w, some), {**smoothed, "bias": bias})
    x, y = head(900, features=3, vocab=3)  # each label often: long sums of gradients
    few = floats(3, seed=5).requires_grad_()
    options = {"label_smoothing": 0.1, "reduction": "none", "bias": few}
    yield Sample("smoothed_none_few_labels", (x, y, ids(900, vocab=3)), options)
    yield Sample("softcap", (h, w, some), {"softcap": 5.0})
    yield Sample("softcap_none", (h, w, some), {"softcap": 5.0, "reduction": "none"})
    yield Sample("softcap_ties", (h, w, some), {"softcap": 0.05})
    yield Sample("normalizer", (h, w, some), {"normalizer": 40})
    yield Sample("normalizer_tensor", (h, w, some), {"normalizer": torch.tensor(2.5), "bias": bias})
    yield Sample("normalizer_count", (h, w, some), {"normalizer": torch.tensor(1000)})
    yield Sample("ignore_index_in_vocabulary", (h, w, labels % 4), {"ignore_index": 2})
    yield Sample("ignore_index_0", (h, w, labels % 4), {"ignore_index": 0, "reduction": "none"})
    yield Sample("frozen_head", (h, w.detach(), some), {"bias": bias.detach()})
    yield Sample("frozen_hidden", (h.detach(), w, some), {"bias": bias})
    yield Sample("frozen_weight", (h, w.detach(), some), {"bias": bias, "label_smoothing": 0.1})
    yield Sample("bias_only", (h.detach(), w.detach(), some), {"bias": bias})
    yield Sample("frozen", (h.detach(), w.detach(), some))
    yield Sample("frozen_none", (h.detach(), w.detach(), some), {"reduction": "none"})
    yield Sample("int32_labels", (h, w, some.int()))
    one, w_one = head()
    yield Sample("one_row", (one, w_one, ids(vocab=37)))

    none = torch.full((3, 5), -100)
    dirty = h.detach().clone()
    dirty[0, 1], dirty[1, 2] = torch.nan, torch.inf
    dirty = dirty.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = {"bias": bias, "reduction": reduction, "label_smoothing": 0.1}
        yield Sample(f"dirty_{reduction}", (dirty, w, some), options)
        yield Sample(f"all_ignored_{reduction}", (dirty, w, none), options)
        yield Sample(f"no_rows_{reduction}", (h[:0], w, labels[:0]), options)

    for vocab in (1, 2, 15, 17, 511, 1025, 2053, 30522):
        x, y = head(3, vocab=vocab, features=8 if vocab > 10_000 else 33, seed=vocab)
        last = torch.tensor([vocab - 1, 0, vocab // 2])
        options = {"label_smoothing": 0.1, "softcap": 9.0}
        yield Sample(f"vocabulary_of_{vocab}", (x, y, last), options)
    x, y = head(700, features=5, vocab=1100)  # several chunks, blocks of rows, tiles of columns
    yield Sample("several_tiles", (x, y, ids(700, vocab=1100)))
    x, y = head(6, features=1)
    yield Sample("one_feature", (x, y, ids(6, vocab=37)))
    x, y = head(4, scale=300.0)
    yield Sample("large_logits", (x, y, ids(4, vocab=37)))
    right = torch.eye(37, 24).to(dtype)  # rows that are right, at the first of equal logits or not
    yield Sample("right", (right[:20].clone().requires_grad_(), right * 9, torch.arange(20)))
    equal = torch.zeros(600, 24, dtype=dtype)
    tied = torch.tensor([0, 1, 599, 0])
    yield Sample("ties", (floats(4, 24).requires_grad_(), equal, tied))
    excluded = floats(1500, seed=5)
    excluded[:700] = -torch.inf  # the first tiles hold nothing but excluded columns
    x, y = head(3, vocab=1500)
    tokens = torch.tensor([700, 1499, 900])
    yield Sample("excluded_columns", (x, y, tokens), {"bias": excluded})
    yield Sample("excluded_columns_softcap", (x, y, tokens), {"bias": excluded, "softcap": 8.0})

    wide = floats(4, 7, 48).requires_grad_()
    labels = ids(4, 7, vocab=37)
    yield Sample("sliced_time", (wide[:, :-1, :24], w, labels[:, 1:]))
    yield Sample("transposed_rows", (wide.transpose(0, 1)[..., ::2], w, labels.t()))
    yield Sample("expanded", (wide[:1, ..., :24].expand(4, 7, 24), w[:, :1].expand(37, 24), labels))
    mixed = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    yield Sample("mixed_dtypes", (h, w.detach().to(mixed).requires_grad_(), some))


def of_length(length: int) -> Sample:
    head = hidden_and_weight(2, length, features=8, vocab=33, dtype=torch.float32)
    return Sample(
        "", (*head, ids(2, length, vocab=33)), {"ignore_index": 3, "return_correct": True}
    )


def rejected() -> Iterator[Rejected]:
    h, w, labels = torch.randn(2, 3, 8), torch.randn(5, 8), torch.zeros(2, 3, dtype=torch.long)

    def wrong(name: str, message: str, error: type[Exception] = ValueError, **kwargs) -> Rejected:
        arguments = {"hidden": h, "weight": w, "labels": labels, **kwargs}
        args = tuple(arguments.pop(k) for k in ("hidden", "weight", "labels"))
        return Rejected(name, args, arguments, error, message)

    yield wrong("not_a_tensor", "weight: expected a tensor", TypeError, weight=None)
    yield wrong("integer_hidden", "hidden: expected dtype float32", TypeError, hidden=labels)
    yield wrong("float_labels", "labels: expected dtype int64", TypeError, labels=h[..., 0])
    yield wrong("weight_shape", r"weight: .*\(V, 8\).*\(5, 7\)", weight=w[:, :7])
    yield wrong("bias_shape", r"bias: .*\(5,\).*\(5, 1\)", bias=torch.randn(5, 1))
    yield wrong("label_shape", r"labels: .*\(2, 3\).*\(2, 2\)", labels=labels[:, :2])
    yield wrong("label_too_large", r"labels: .*-100.*\[0, 5\).*5 in row 0", labels=labels + 5)
    yield wrong("label_negative", "labels: .*-100.*-1 in row 0", labels=labels - 1)
    yield wrong("label_not_ignored", "labels: .* -1 .*-100", labels=labels - 100, ignore_index=-1)
    yield wrong("label_none", "labels: ", labels=labels - 1, reduction="none")
    yield wrong("ignore_index", "ignore_index: expected an int", TypeError, ignore_index=1.0)
    yield wrong("smoothing_of_1", r"label_smoothing: .*\[0.0, 1.0\), got 1.0", label_smoothing=1.0)
    yield wrong("smoothing_negative", "label_smoothing: ", label_smoothing=-0.1)
    yield wrong("reduction", "reduction: .*'average'", reduction="average")
    yield wrong("normalizer", "normalizer: .*above 0", normalizer=0)
    yield wrong("normalizer_of_sum", "normalizer: expected None", normalizer=2.0, reduction="sum")
    yield wrong("normalizer_shape", "normalizer: expected 0 dim", normalizer=torch.ones(2))
    needs_grad = torch.ones((), requires_grad=True)
    yield wrong("normalizer_grad", "normalizer: .*not require grad", normalizer=needs_grad)
    yield wrong("return_correct", "return_correct: ", TypeError, return_correct=1)
    yield wrong("softcap", "softcap: .*above 0", softcap=0.0)
    yield wrong("logit_scale", "logit_scale: .*above 0", logit_scale=-1.0)
    yield wrong("backend", "backend: .*'fastest'", backend="fastest")


def eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def eager_of_selected(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    counts = labels != -100
    return eager(hidden[counts], weight, labels[counts], bias=bias)


def _benchmark(name: str, plain, sizes=(2048, 768, 30522), labelled=0.15, **options) -> Benchmark:
    """labelled: the share of rows that count. The head has a bias where that is not all."""
    rows, features, vocab = sizes

    def make(dtype: torch.dtype) -> Sample:
        hidden, weight = hidden_and_weight(rows, features=features, vocab=vocab, dtype=dtype)
        labels = ids(rows, vocab=vocab)
        if labelled == 1:
            return Sample("", (hidden, weight, labels))
        bias = normal(vocab, dtype=dtype, seed=2).requires_grad_()
        counts = torch.rand(rows, generator=seeded(3)) < labelled
        return Sample("", (hidden, weight, labels.masked_fill(~counts, -100)), {"bias": bias})

    return Benchmark(
        name=f"{rows} x {features} x {vocab}{name}",
        make=make,
        eager=plain,
        dtypes=(torch.float32, torch.bfloat16),
        # the weight is read and its gradient written in the forward pass; nothing afterwards
        bytes_moved=lambda s: 2 * s.args[1].numel() * s.args[1].element_size(),
        backward_bytes_moved=lambda s: 0,
        flops=lambda s: 2 * int(labelled * rows) * features * vocab,
        backward_flops=lambda s: 4 * int(labelled * rows) * features * vocab,
        **options,
    )


def _selected_first() -> dict[str, Callable]:
    return {"eager on those": eager_of_selected}


OP = Op(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=reference.linear_cross_entropy,
    kernels=("linear_cross_entropy_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("hidden", "weight", "bias"),
    source="Szegedy 2016; Wijmans 2024",
    summary="cross-entropy of an output head; ignored rows cost nothing",
    benchmarks=(
        _benchmark(", 15 % labelled, eager on all rows", eager),
        _benchmark(", 15 % labelled, eager on those", eager_of_selected),
        _benchmark("", eager, (8192, 4096, 128256), labelled=1, devices=("cuda",)),
        _benchmark(
            ", 15 % labelled",
            eager,
            (65536, 1024, 30522),
            devices=("cuda",),
            peers=(_selected_first,),
        ),
    ),
)
