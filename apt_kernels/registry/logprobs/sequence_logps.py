"""sequence_logps: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import reference
from ...ops.logprobs.sequence_logps import sequence_logps
from ..entry import Benchmark, Op, Rejected, Sample, seeded


def _logps(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    return (-4 * torch.rand(shape, generator=generator)).to(dtype)


def _mask(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed)) < 0.6


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x, mask = _logps(5, 37, dtype=dtype).requires_grad_(), _mask(5, 37)
    yield Sample("sum", (x, mask))
    yield Sample("average", (x, mask), {"average": True})
    yield Sample("int_mask", (x, mask.long()))
    yield Sample("float_mask", (x, mask.float() * 0.5), {"average": True})

    dirty = _logps(5, 37, dtype=dtype)
    dirty[~mask] = torch.nan
    dirty[0, mask[0].logical_not()] = torch.inf
    dirty[3] = torch.nan
    nothing = mask.clone()
    nothing[3] = False
    for average in (False, True):
        name = "average" if average else "sum"
        leaf = dirty.clone().requires_grad_()
        yield Sample(f"dirty_slots_{name}", (leaf, nothing), {"average": average})
        yield Sample(f"all_masked_{name}", (leaf, mask & False), {"average": average})
        yield Sample(
            f"long_{name}",
            (_logps(3, 5001, dtype=dtype).requires_grad_(), _mask(3, 5001)),
            {"average": average},
        )
    excluded = _logps(2, 9, dtype=dtype)
    excluded[0, 4] = -torch.inf
    yield Sample("minus_infinity", (excluded.requires_grad_(), torch.ones(2, 9)))

    wide, mask = _logps(6, 70, dtype=dtype).requires_grad_(), _mask(6, 70)
    yield Sample("sliced", (wide[::2, 1:], mask[::2, :-1]), {"average": True})
    yield Sample("every_other", (wide[:, ::2], mask[:, ::2]))
    yield Sample("transposed", (wide.t(), mask.t()), {"average": True})
    yield Sample("expanded", (wide[:1].expand(6, 70), mask))
    yield Sample("expanded_tokens", (wide[:, :1].expand(6, 70), mask), {"average": True})
    yield Sample("expanded_mask", (wide, mask[:1].expand(6, 70)))
    for length in (0, 1, 15, 16, 17):
        yield Sample(f"length_{length}", (wide[:, :length], mask[:, :length]), {"average": True})
    yield Sample("one_row", (wide[:1], mask[:1]))
    yield Sample("no_rows", (wide[:0], mask[:0]))
    yield Sample("many_rows", (_logps(700, 60, dtype=dtype).requires_grad_(), _mask(700, 60)))
    yield Sample("frozen", (wide.detach(), mask))


def of_length(length: int) -> Sample:
    x = _logps(3, length, dtype=torch.float32).requires_grad_()
    return Sample("", (x, _mask(3, length)), {"average": True})


def rejected() -> Iterator[Rejected]:
    x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    yield Rejected("not_a_tensor", ([1.0], mask), {}, TypeError, "logps: expected a tensor")
    yield Rejected("integer_logps", (mask.long(), mask), {}, TypeError, "logps: expected dtype")
    yield Rejected("one_dimension", (x[0], mask[0]), {}, ValueError, r"logps: .*2 dim.*\(3,\)")
    yield Rejected("three_dimensions", (x[None], mask), {}, ValueError, r"logps: .*\(1, 2, 3\)")
    yield Rejected("mask_shape", (x, mask[:, 1:]), {}, ValueError, r"mask: expected shape \(2, 3\)")
    yield Rejected("mask_type", (x, None), {}, TypeError, "mask: expected a tensor")
    yield Rejected("mask_device", (x, mask.to("meta")), {}, ValueError, "mask: .*meta")
    yield Rejected("average", (x, mask), {"average": 1}, TypeError, "average: .*got 1")
    yield Rejected("backend", (x, mask), {"backend": "cpp"}, ValueError, "backend: .*'cpp'")


def eager(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logps * mask).sum(-1)


def _benchmark(rows: int, length: int) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = _logps(rows, length, dtype=dtype).requires_grad_()
        return Sample("", (x, _mask(rows, length)))

    return Benchmark(
        name=f"{rows} x {length}",
        make=make,
        eager=eager,
        # forward reads log-probabilities and mask; backward the mask, and writes the gradient
        bytes_moved=lambda s: s.args[0].numel() * 5,
        backward_bytes_moved=lambda s: s.args[0].numel() * 5,
    )


OP = Op(
    name="sequence_logps",
    function=sequence_logps,
    reference=reference.sequence_logps,
    kernels=("sequence_logps_fwd", "sequence_logps_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Rafailov 2023",
    summary="sums of the log-probabilities of a sequence",
    benchmarks=(_benchmark(16, 512), _benchmark(64, 4096)),
)
