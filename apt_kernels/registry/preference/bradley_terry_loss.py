"""bradley_terry_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import reference
from ...ops.preference.bradley_terry_loss import bradley_terry_loss
from ..entry import Benchmark, Op, Rejected, Sample, seeded


def _rewards(*shape: int, dtype: torch.dtype, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = seeded(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def pairs(*shape: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(_rewards(*shape, dtype=dtype, seed=seed, **kwargs) for seed in (0, 1))

    both = pairs(7)
    margins = torch.linspace(0, 1.5, 7)
    options = {
        "plain": {},
        "margin": {"margin": 0.7},
        "margins": {"margin": margins},
        "centred": {"center_coef": 0.05},
        "all": {"margin": margins, "center_coef": 0.05},
        "negative_margin": {"margin": -0.7},
        "int_margin": {"margin": 1},
        "margins_same_dtype": {"margin": margins.to(dtype)},
    }
    for reduction in ("mean", "sum", "none"):
        for name, chosen in options.items():
            yield Sample(f"{name}_{reduction}", both, {**chosen, "reduction": reduction})
    for count in (0, 1, 15, 16, 17, 1000, 2049, 20000):
        if count > 2049 and dtype != torch.float32:
            continue
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "center_coef": 0.01}
            yield Sample(f"{count}_pairs_{reduction}", pairs(count), options)
    large = torch.tensor([500.0, -500, 0, 60000, -60000, 88, -88, 17], dtype=dtype)
    large, small = large.requires_grad_(), _rewards(8, dtype=dtype, seed=3, scale=0.1)
    for reduction in ("mean", "none"):
        yield Sample(f"large_{reduction}", (large, small), {"reduction": reduction})
    infinite = torch.tensor([torch.inf, -torch.inf, 1, torch.inf], dtype=dtype).requires_grad_()
    options = {"reduction": "none"}  # without a centre their sum is not asked for
    yield Sample("infinite_rewards", (infinite, pairs(4)[1]), options)
    columns = pairs(9, 1)
    yield Sample("column_mean", columns, {"margin": torch.rand(9, 1)})
    yield Sample("column_none", columns, {"reduction": "none"})
    yield Sample("zero_dimensions", pairs(), {"reduction": "none"})
    yield Sample("three_dimensions", pairs(2, 3, 4), {"reduction": "none", "center_coef": 1})
    wide = _rewards(9, 6, dtype=dtype, seed=4)
    yield Sample("sliced", (wide[:, 1], wide[:, 4]), {"margin": torch.rand(9, 3)[:, 0]})
    yield Sample("every_other", (wide[::2, :3], wide[::2, 3:]))
    yield Sample("transposed", (wide[:, :3].t(), wide[:, 3:].t()), {"reduction": "none"})
    yield Sample("expanded", (wide[:1, 0].expand(8), wide[:8, 1]), {"reduction": "none"})
    yield Sample("frozen_chosen", (both[0].detach(), both[1]))
    yield Sample("frozen_rejected", (both[0], both[1].detach()), {"reduction": "none"})
    yield Sample("frozen", tuple(x.detach() for x in both))


def of_length(length: int) -> Sample:
    rewards = (_rewards(length, dtype=torch.float32, seed=seed) for seed in (0, 1))
    return Sample("", tuple(rewards), {"margin": torch.rand(length), "center_coef": 0.1})


def rejected() -> Iterator[Rejected]:
    x = torch.randn(5)

    def call(name, message, error=ValueError, args=(x, x), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "chosen_rewards: expected a tensor", TypeError, ([1.0], x))
    yield call("integers", "chosen_rewards: expected dtype", TypeError, (x.long(), x))
    yield call("rejected_type", "rejected_rewards: expected a tensor", TypeError, (x, 1.0))
    yield call("rejected_dtype", "rejected_rewards: expected dtype", TypeError, (x, x.long()))
    yield call("shapes", r"rejected_rewards: .*\(5,\).*got \(5, 1\)", args=(x, x[:, None]))
    yield call("device", "rejected_rewards: .*meta", args=(x, x.to("meta")))
    yield call("margin_shape", r"margin: expected shape \(5,\)", margin=x[:3])
    yield call("margin_type", "margin: expected a number", TypeError, margin="1")
    yield call("margin_dtype", "margin: expected dtype", TypeError, margin=x.long())
    yield call("margin_nan", "margin: expected a finite number", margin=float("nan"))
    yield call("margin_grad", "margin: .*does not require grad", margin=x.clone().requires_grad_())
    yield call("center_coef", "center_coef: .*at least 0", center_coef=-1.0)
    yield call("center_coef_none", "center_coef: expected a number", TypeError, center_coef=None)
    yield call("reduction", "reduction: .*'none'.*got 'average'", reduction="average")
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(chosen - rejected).mean()


def _benchmark(pairs: int) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        return Sample("", tuple(_rewards(pairs, dtype=dtype, seed=seed) for seed in (0, 1)))

    return Benchmark(
        name=f"{pairs} pairs",
        make=make,
        eager=eager,
        # forward reads both and writes both gradients, which backward scales
        bytes_moved=lambda s: s.args[0].numel() * 16,
        backward_bytes_moved=lambda s: s.args[0].numel() * 16,
    )


OP = Op(
    name="bradley_terry_loss",
    function=bradley_terry_loss,
    reference=reference.bradley_terry_loss,
    kernels=("bradley_terry_loss_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Bradley & Terry 1952",
    summary="loss of a reward model on preference pairs",
    benchmarks=(_benchmark(8), _benchmark(65536)),
)
