"""ema_update_: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import reference
from ...ops.contrastive.ema_update_ import ema_update_
from ..entry import FLOAT_DTYPES, Benchmark, Op, Rejected, Sample, seeded


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def _pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return _randn(*shape, seed=1, dtype=dtype), _randn(*shape, seed=2, dtype=dtype)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def tensors(*shapes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = [_pair(*shape, dtype=dtype) for shape in shapes]
        return [t for t, _ in pairs], [s for _, s in pairs]

    model = tensors((3, 5), (17,), (), (0,), (2, 3, 4, 5), (1000,), (16,), (1,))
    for momentum in (0.99, 0.5, 0.0, 1.0, 1e-3, 0):
        yield Sample(f"momentum_{momentum}", (*model, momentum))
    yield Sample("one_tensor", (*_pair(6, 7, dtype=dtype), 0.9))
    yield Sample("large", (*tensors((300, 400), (5,), (70_000,)), 0.996))
    yield Sample("many", (*tensors(*((i % 7, 9) for i in range(100))), 0.9))

    t, s = _pair(4, 4, dtype=dtype)
    targets = [torch.tensor(7), torch.tensor([5]), torch.zeros(3).bool(), t]
    sources = [torch.tensor(9), torch.tensor([-1]), torch.ones(3).bool(), s]
    for momentum in (0.9, 0.0, 1.0):
        yield Sample(f"integers_{momentum}", (targets, sources, momentum))
    for other in FLOAT_DTYPES:
        name = str(other).removeprefix("torch.")
        target, source = _pair(50, dtype=dtype)[0], _pair(50, dtype=other)[1]
        yield Sample(f"sources_in_{name}", ([target], [source], 0.9))
        yield Sample(f"copied_from_{name}", ([target], [source], 0.0))
    yield Sample("sources_int64", (_pair(9, dtype=dtype)[0], torch.arange(9), 0.75))

    t, s = _pair(8, 12, dtype=dtype)
    yield Sample("transposed", ([t.t(), t.clone()], [s.t(), s], 0.9))
    yield Sample("target_transposed", ([t.t()], [s.t().contiguous()], 0.9))
    yield Sample("source_expanded", ([t], [s[:1].expand(8, 12)], 0.9))
    yield Sample(
        "sliced", ([t[1:-1, ::3], t.clone()[2]], [s[1:-1, 1::3], s[:, 2][:1].expand(12)], 0.9)
    )
    sizes = (3, 2300, 5, 9000, 1, 77)
    t, s = _pair(1 + sum(sizes), dtype=dtype)
    for further in (0, 1):
        parts = (x[1 - shift :].narrow(0, 0, sum(sizes)) for x, shift in ((t, 0), (s, further)))
        yield Sample(f"parts_of_a_buffer_{further}", (*(list(p.split(sizes)) for p in parts), 0.9))
    mixed = _pair(5000, dtype=dtype)[0][3:], _pair(5000, dtype=torch.bfloat16)[1][3:]
    yield Sample("parts_of_buffers_in_bfloat16", (*([x] for x in mixed), 0.9))
    extreme = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0, 3e38]).to(dtype)
    yield Sample("not_finite", ([extreme], [extreme.flip(0).contiguous()], 0.9))
    yield Sample("copied_not_finite", ([extreme], [extreme.flip(0).contiguous()], 0.0))


def of_length(length: int) -> Sample:
    t, s = _pair(length, 3)
    return Sample("", ([t, t.clone()[0]], [s, s.clone()[0]], 0.9))


def rejected() -> Iterator[Rejected]:
    t, s = _pair(2, 3)
    for value in (-0.1, 1.1, float("nan")):
        message = rf"momentum: .*\[0, 1\], got {value}"
        yield Rejected(f"momentum_{value}", (t, s, value), {}, ValueError, message)
    yield Rejected("momentum_type", (t, s, "1"), {}, TypeError, "momentum: expected a number")
    yield Rejected("count", ([t, t], [s], 0.9), {}, ValueError, "sources: .*as targets, 2, got 1")
    yield Rejected("shape", ([s, t], [s, t[:1]], 0.9), {}, ValueError, r"sources\[1\]: .*\(2, 3\)")
    yield Rejected("target", ([[1.0]], [s], 0.9), {}, TypeError, r"targets\[0\]: expected a tensor")
    yield Rejected("source", ([t], [1.0], 0.9), {}, TypeError, r"sources\[0\]: expected a tensor")
    complex_pair = ([t.to(torch.complex64)], [s])
    yield Rejected("complex", (*complex_pair, 0.9), {}, TypeError, r"targets\[0\]: expected dtype")
    yield Rejected("device", ([t], [s.to("meta")], 0.9), {}, ValueError, r"sources\[0\]: .*device")
    yield Rejected(
        "backend", (t, s, 0.9), {"backend": "fastest"}, ValueError, "backend: .*'fastest'"
    )


def eager(targets: list[torch.Tensor], sources: list[torch.Tensor], momentum: float) -> None:
    torch._foreach_lerp_(targets, sources, 1 - momentum)


def _parameters(dtype: torch.dtype) -> Sample:
    """A network of 25 M parameters in 200 tensors, as large as ResNet-50."""
    shapes = [(1024, 487), (512,), (256,), (3, 3)] * 50
    targets = [_randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    return Sample("", (targets, [_randn(*t.shape, seed=9, dtype=dtype) for t in targets], 0.99))


OP = Op(
    name="ema_update_",
    function=ema_update_,
    reference=reference.ema_update_,
    kernels=("ema_update_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="He 2020",
    summary="exponential moving average of many tensors, in place",
    benchmarks=(
        Benchmark(
            name="25 M in 200 tensors",
            make=_parameters,
            eager=eager,
            dtypes=(torch.float32, torch.bfloat16),
            backward=False,
            bytes_moved=lambda s: 3 * sum(t.numel() * t.element_size() for t in s.args[0]),
        ),
    ),
)
