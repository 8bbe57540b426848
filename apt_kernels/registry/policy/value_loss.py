"""value_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import codes, reference
from ...ops.policy.value_loss import value_loss
from ..entry import Benchmark, Op, Rejected, Sample, seeded

AGGREGATIONS = tuple(codes.AGGREGATIONS)


def _tokens(rows: int, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = seeded(0)
    values, returns, old = torch.randn((3, rows, length), generator=generator)
    return {
        "values": values.to(dtype, copy=True).requires_grad_(),
        "returns": (0.7 * values + returns).to(dtype),
        "mask": torch.rand((rows, length), generator=generator) < 0.7,
        "old_values": (values + 0.4 * old).to(dtype),
    }


def _call(name: str, x: dict[str, torch.Tensor], **kwargs) -> Sample:
    if kwargs.get("clip_range"):
        kwargs["old_values"] = x["old_values"]
    return Sample(name, (x["values"], x["returns"], x["mask"]), kwargs)


def _masked(dtype: torch.dtype) -> Iterator[Sample]:
    x = _tokens(6, 40, dtype)
    some = x["mask"].clone()
    some[3] = False
    for kind, mask in (("dirty", some), ("all_masked", torch.zeros_like(some))):
        dirty = {"mask": mask}
        for (name, value), bad in zip(x.items(), (torch.nan, torch.inf, None, -torch.inf)):
            if name != "mask":
                filled = torch.where(mask, value.detach(), bad).to(dtype)
                dirty[name] = filled.requires_grad_(value.requires_grad)
        for aggregation in AGGREGATIONS:
            for clip_range in (None, 0.2):
                kwargs = {"clip_range": clip_range, "aggregation": aggregation}
                yield _call(f"{kind}_{aggregation}_{clip_range}", dirty, **kwargs)
    yield _call("int_mask", {**x, "mask": some.long()}, clip_range=0.2)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x = _tokens(5, 37, dtype)
    yield _call("plain", x)
    yield _call("clipped", x, clip_range=0.2)
    yield _call("normalizer", x, clip_range=0.5, normalizer=torch.tensor(31.0))
    yield _call("number", x, normalizer=12, aggregation="sequence_mean")
    for aggregation in AGGREGATIONS:
        for clip_range in (None, 0.2, 100):
            kwargs = {"clip_range": clip_range, "aggregation": aggregation}
            yield _call(f"{aggregation}_{clip_range}", x, **kwargs)
            yield _call(f"{aggregation}_{clip_range}_normalizer", x, normalizer=7.5, **kwargs)
    yield from _masked(dtype)
    for length in (37, 700):  # the mean is rounded: around it equal returns seem to vary
        equal = _tokens(3, length, dtype)
        equal["returns"] = torch.full_like(equal["returns"], 9.9)
        yield _call(f"equal_returns_{length}", equal)
    yield _call("perfect", {**x, "returns": x["values"].detach().clone()}, clip_range=0.1)
    far = {**x, "returns": (x["returns"].detach().float() + 64).to(dtype)}
    yield _call("far_from_zero", far, clip_range=0.2)
    wide = _tokens(12, 60, dtype)
    for name, cut in (
        ("sliced", lambda t: t[1::2, 3:]),
        ("every_other", lambda t: t[:, ::2]),
        ("transposed", lambda t: t.t()),
        ("expanded_rows", lambda t: t[:1].expand(5, 60)),
        ("expanded_tokens", lambda t: t[:, :1].expand(12, 21)),
    ):
        yield _call(name, {n: cut(t) for n, t in wide.items()}, clip_range=0.2)
    for rows, length in ((1, 1), (6, 1), (3, 15), (3, 16), (3, 17), (40, 200), (2, 5001)):
        yield _call(f"{rows}_rows_of_{length}", _tokens(rows, length, dtype), clip_range=0.2)
    for rows, length in ((0, 5), (3, 0)):
        for aggregation in AGGREGATIONS:
            name = f"{rows}_rows_of_{length}_{aggregation}"
            yield _call(name, _tokens(rows, length, dtype), aggregation=aggregation)
    yield _call("frozen", {**x, "values": x["values"].detach()})
    if dtype == torch.bfloat16:
        mixed = {**x, "returns": x["returns"].float(), "old_values": x["old_values"].double()}
        yield _call("mixed_dtypes", mixed, clip_range=0.2)


def of_length(length: int) -> Sample:
    return _call("", _tokens(3, length, torch.float32), clip_range=0.2)


def rejected() -> Iterator[Rejected]:
    x = _tokens(3, 5, torch.float32)
    v, r, mask, old = (x[n] for n in ("values", "returns", "mask", "old_values"))
    grad = old.clone().requires_grad_()

    def call(name, message, error=ValueError, args=(v, r, mask), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "values: expected a tensor", TypeError, ([1.0], r, mask))
    yield call("integers", "values: expected dtype", TypeError, (mask.long(), r, mask))
    yield call("one_dim", r"values: .*2 dim.*\(5,\)", args=(v[0], r[0], mask[0]))
    yield call("returns_shape", r"returns: .*\(3, 5\).*\(3,\)", args=(v, r[:, 0], mask))
    yield call("returns_none", "returns: expected a tensor", TypeError, (v, None, mask))
    yield call("returns_grad", "returns: .*not require grad", args=(v, grad, mask))
    yield call("returns_device", "returns: .*meta", args=(v, r.to("meta"), mask))
    yield call("mask_shape", r"mask: .*\(3, 5\)", args=(v, r, mask[0]))
    yield call("mask_none", "mask: expected a tensor", TypeError, (v, r, None))
    yield call("old_alone", "old_values: expected None .*clip_range", old_values=old)
    yield call("range_alone", "old_values: expected a tensor", TypeError, clip_range=0.2)
    yield call("old_shape", r"old_values: .*\(3, 5\)", clip_range=0.2, old_values=old[:2])
    yield call("old_grad", "old_values: .*not require", clip_range=0.2, old_values=grad)
    for bad in (0.0, -1.0, float("inf")):
        yield call(f"range_{bad}", "clip_range: .*above 0", clip_range=bad, old_values=old)
    yield call("range_type", "clip_range: .*number", TypeError, clip_range="1", old_values=old)
    yield call("aggregation", "aggregation: .*'token_mean'.*got 'sum'", aggregation="sum")
    yield call("normalizer", "normalizer: .*above 0", normalizer=0.0)
    yield call("normalizer_type", "normalizer: expected a number", TypeError, normalizer="3")
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, old_values: torch.Tensor,
    clip_range: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    held = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns) ** 2, (held - returns) ** 2
    tokens = mask.sum().clamp(min=1)
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum() / tokens
    return loss, {"clip_fraction": ((clipped > plain) & mask).sum() / tokens}


def _benchmark(rows: int, length: int) -> Benchmark:
    return Benchmark(
        name=f"{rows} x {length}",
        make=lambda dtype: _call("", _tokens(rows, length, dtype), clip_range=0.2),
        eager=eager,
        # forward reads three numbers and the mask and writes the gradient, which backward scales
        bytes_moved=lambda s: s.args[0].numel() * (3 * s.args[0].element_size() + 5),
        backward_bytes_moved=lambda s: s.args[0].numel() * 8,
    )


OP = Op(
    name="value_loss",
    function=value_loss,
    reference=reference.value_loss,
    kernels=("value_loss_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Schulman 2017, Dhariwal 2017",
    summary="loss of value functions, with clipping",
    benchmarks=(_benchmark(8, 256), _benchmark(64, 2048)),
)
