"""group_advantages: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import reference
from ...ops.policy.group_advantages import group_advantages
from ..entry import Benchmark, Op, Rejected, Sample, seeded

KINDS = ("relative", "normalized", "rank", "leave_one_out")


def _rewards(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=seeded(0)).to(dtype)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    for kind in KINDS:
        yield Sample(kind, (_rewards(48, dtype), 8, kind))
    for kind in KINDS:
        for groups, size in ((1, 1), (5, 1), (1, 2), (7, 5), (3, 16), (300, 8), (2, 200), (0, 4)):
            yield Sample(f"{kind}_{groups}_of_{size}", (_rewards(groups * size, dtype), size, kind))
        yield Sample(f"{kind}_equal", (torch.full((12,), 0.1).to(dtype), 6, kind))
        ties = (3 * _rewards(40, dtype)).round()
        yield Sample(f"{kind}_ties", (ties, 10, kind))
        yield Sample(f"{kind}_strided", (_rewards(120, dtype)[1::3], 8, kind))
        yield Sample(f"{kind}_expanded", (_rewards(1, dtype).expand(12), 4, kind))
        yield Sample(f"{kind}_far_from_zero", ((_rewards(24, dtype) + 100).to(dtype), 8, kind))
        correct = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
        yield Sample(f"{kind}_integers", (correct, 4, kind))
        yield Sample(f"{kind}_booleans", (correct.bool(), 4, kind))
    yield Sample("eps", (_rewards(48, dtype), 8, "normalized"), {"eps": 1e-2})


def of_length(length: int) -> Sample:
    return Sample("", (_rewards(4 * length, torch.float32), 4, "normalized"))


def rejected() -> Iterator[Rejected]:
    x = torch.randn(12)

    def call(name, message, error=ValueError, args=(x, 4), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "rewards: expected a tensor", TypeError, ([1.0], 1))
    yield call("complex", "rewards: expected dtype", TypeError, (x.cfloat(), 4))
    yield call("two_dims", r"rewards: expected 1 dim.*\(3, 4\)", args=(x.view(3, 4), 4))
    for bad in (5, 0, -4, 24):
        yield call(f"size_{bad}", f"group_size: .*divisor.*12, got {bad}", args=(x, bad))
    yield call("size_type", "group_size: expected an integer", TypeError, (x, 4.0))
    yield call("size_bool", "group_size: expected an integer", TypeError, (x, True))
    yield call("kind", "kind: .*'rank'.*got 'grpo'", kind="grpo")
    yield call("eps", "eps: .*above 0", eps=0.0)
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(rewards: torch.Tensor, group_size: int, kind: str, eps: float = 1e-8) -> torch.Tensor:
    r = rewards.view(-1, group_size)
    return ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + eps)).view(-1)


def _benchmark(groups: int, size: int) -> Benchmark:
    return Benchmark(
        name=f"{groups} groups of {size}",
        make=lambda dtype: Sample("", (_rewards(groups * size, dtype), size, "normalized")),
        eager=eager,
        backward=False,
        bytes_moved=lambda s: s.args[0].numel() * (s.args[0].element_size() + 4),
    )


OP = Op(
    name="group_advantages",
    function=group_advantages,
    reference=reference.group_advantages,
    kernels=("group_advantages_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Shao 2024, Ahmadian 2024",
    summary="advantages of rewards within their group",
    benchmarks=(_benchmark(64, 8),),
)
