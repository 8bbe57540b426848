"""kl_penalty: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import reference
from ...ops.policy.kl_penalty import kl_penalty
from ..entry import Benchmark, Op, Rejected, Sample, seeded

ESTIMATORS = ("k1", "k2", "k3")


def _logps(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(0)
    logps = -4 * torch.rand(shape, generator=generator)
    ref = logps + 0.5 * torch.randn(shape, generator=generator)
    return logps.to(dtype).requires_grad_(), ref.to(dtype)


def _mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(1)) < 0.6


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x, mask = _logps(5, 37, dtype=dtype), _mask(5, 37)
    for estimator in ESTIMATORS:
        yield Sample(estimator, (*x, estimator))
    yield Sample("masked", x, {"mask": mask})
    distance = torch.tensor([1e-4, 1e-3, 0.01, 0.3, 0.9, 1, 1.1, 3, 10, 19.5, 20, 20.5, 80, 300])
    distance = torch.cat([distance, -distance, torch.zeros(2)])
    if dtype == torch.float16:  # a gradient of e^20 is beyond its range
        distance = distance.clamp(-8, 8)
    ref = torch.full_like(distance, -0.25)
    dirty, dirty_ref = (torch.where(mask, t.detach(), torch.nan).to(dtype) for t in x)
    dirty[0, ~mask[0]] = torch.inf
    for estimator in ESTIMATORS:
        far = (ref + distance).to(dtype).requires_grad_()
        yield Sample(f"{estimator}_far", (far, ref.to(dtype), estimator))
        leaf = dirty.clone().requires_grad_()
        yield Sample(f"{estimator}_dirty", (leaf, dirty_ref, estimator), {"mask": mask})
        none = {"mask": torch.zeros_like(mask)}
        yield Sample(f"{estimator}_all_masked", (leaf, dirty_ref, estimator), none)
        near = (ref + distance.clamp(-0.01, 0.01)).to(dtype).requires_grad_()
        yield Sample(f"{estimator}_near", (near, ref.to(dtype), estimator))
        infinite = x[1].clone()
        infinite[0, 0] = -torch.inf  # also where it counts
        yield Sample(f"{estimator}_infinite", (x[0], infinite, estimator))
        same = (x[1].clone().requires_grad_(), x[1], estimator)
        yield Sample(f"{estimator}_equal", same)
        yield Sample(f"{estimator}_long", (*_logps(3, 5001, dtype=dtype), estimator))
        for count in (0, 1, 15, 16, 17, 40000):
            few = _logps(count, dtype=dtype)
            yield Sample(f"{estimator}_{count}", (*few, estimator), {"mask": _mask(count)})
    yield Sample("no_dimensions", _logps(dtype=dtype))
    yield Sample("three_dimensions", _logps(2, 3, 7, dtype=dtype), {"mask": _mask(2, 3, 7)})
    yield Sample("int_mask", x, {"mask": mask.int()})
    wide, ref, mask = *_logps(12, 60, dtype=dtype), _mask(12, 60)
    for name, cut in (
        ("sliced", lambda t: t[1::2, 3:]),
        ("every_other", lambda t: t[:, ::2]),
        ("transposed", lambda t: t.t()),
        ("expanded", lambda t: t[:1].expand(5, 60)),
    ):
        yield Sample(name, (cut(wide), cut(ref)), {"mask": cut(mask)})
    yield Sample("frozen", (wide.detach(), ref))
    yield Sample("other_dtype", (wide, ref.float() if dtype != torch.float32 else ref.double()))


def of_length(length: int) -> Sample:
    return Sample("", _logps(3, length, dtype=torch.float32), {"mask": _mask(3, length)})


def rejected() -> Iterator[Rejected]:
    x, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)

    def call(name, message, error=ValueError, args=(x, x), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "logps: expected a tensor", TypeError, ([1.0], x))
    yield call("integers", "logps: expected dtype", TypeError, (x.long(), x))
    yield call("ref_type", "ref_logps: expected a tensor", TypeError, (x, None))
    yield call("ref_shape", r"ref_logps: .*\(3, 5\).*\(5,\)", args=(x, x[0]))
    yield call("ref_grad", "ref_logps: .*not require", args=(x, x.clone().requires_grad_()))
    yield call("ref_device", "ref_logps: .*meta", args=(x, x.to("meta")))
    yield call("estimator", "estimator: .*'k3'.*got 'low_var_kl'", estimator="low_var_kl")
    yield call("mask_shape", r"mask: .*\(3, 5\).*\(5, 3\)", mask=mask.t())
    yield call("mask_type", "mask: expected a tensor", TypeError, mask=True)
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    x = (ref_logps - logps).clamp(-20, 20)
    return torch.expm1(x) - x


def _benchmark(rows: int, length: int) -> Benchmark:
    return Benchmark(
        name=f"{rows} x {length}",
        make=lambda dtype: Sample("", _logps(rows, length, dtype=dtype)),
        eager=eager,
        # Both directions read the log-probabilities. Forward writes the penalty. Backward reads
        # the gradient of the penalty and writes the gradient of the log-probabilities.
        bytes_moved=lambda s: s.args[0].numel() * (2 * s.args[0].element_size() + 4),
        backward_bytes_moved=lambda s: s.args[0].numel() * (2 * s.args[0].element_size() + 8),
    )


OP = Op(
    name="kl_penalty",
    function=kl_penalty,
    reference=reference.kl_penalty,
    kernels=("kl_penalty_fwd", "kl_penalty_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Schulman 2020",
    summary="estimates of the KL divergence from a reference policy",
    benchmarks=(_benchmark(64, 2048),),
)
