"""policy_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import codes, reference
from ...ops.policy.policy_loss import policy_loss
from ..entry import Benchmark, Op, Rejected, Sample, seeded

LOSSES = {
    "clip": {},
    "clip_higher": {"clip_low": 0.1, "clip_high": 0.28},
    "dual_clip": {"dual_clip": 1.5},
    "clip_hard": {"clip_low": 0.0, "clip_high": 0.0},
    "cispo": {"loss_type": "cispo"},
    "cispo_no_floor": {"loss_type": "cispo", "clip_low": 1.0, "clip_high": 1.0},
    "sapo": {"loss_type": "sapo"},
    "sapo_temperatures": {
        "loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5
    },
    "reinforce": {"loss_type": "reinforce"},
}  # fmt: skip
ESTIMATORS = tuple(codes.KL_ESTIMATORS)
AGGREGATIONS = tuple(codes.AGGREGATIONS)


def _randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = seeded(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def tokens(rows: int, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor argument; ratios spread over the clip range and beyond."""
    shape = (rows, length)
    logps = -3 * torch.rand(shape, generator=seeded(0))
    old = logps + _randn(*shape, dtype=torch.float32, seed=1, scale=0.3)
    ref = logps + _randn(*shape, dtype=torch.float32, seed=2, scale=0.5)
    mask = torch.rand(shape, generator=seeded(3)) < 0.7
    entropy = 2 * torch.rand(shape, generator=seeded(4))
    weights = 2 * torch.rand(shape, generator=seeded(5))
    return {
        "logps": logps.to(dtype).requires_grad_(),
        "old_logps": old.to(dtype),
        "advantages": (0.3 + _randn(*shape, dtype=torch.float32, seed=6)).to(dtype),
        "mask": mask,
        "ref_logps": ref.to(dtype),
        "entropy": entropy.to(dtype),
        "rollout_weights": weights.to(dtype),
    }


def _call(name: str, x: dict[str, torch.Tensor], *names: str, **kwargs) -> Sample:
    """A call with the four required tensors and the tensors that `names` lists."""
    args = tuple(x[n] for n in ("logps", "old_logps", "advantages", "mask"))
    given = {n: x[n] for n in names}
    if kwargs.get("entropy_coef"):
        given["entropy"] = x["entropy"].detach().clone().requires_grad_()
    return Sample(name, args, {**given, **kwargs})


def _options(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(7, 37, dtype)
    rows = {**x, "advantages": x["advantages"][:, 0], "rollout_weights": x["rollout_weights"][:, 0]}
    for name, options in LOSSES.items():
        for aggregation in AGGREGATIONS:
            yield _call(f"{name}_{aggregation}", x, aggregation=aggregation, **options)
        yield _call(f"{name}_rows", rows, "rollout_weights", **options)
        yield _call(f"{name}_weights", x, "rollout_weights", **options)
        everything = {"kl_coef": 0.1, "entropy_coef": 0.05, "aggregation": "sequence_mean"}
        yield _call(f"{name}_all", x, "ref_logps", "rollout_weights", **everything, **options)
        if name != "reinforce":
            for aggregation in AGGREGATIONS:
                kwargs = {"ratio_level": "sequence", "aggregation": aggregation, **options}
                yield _call(f"{name}_sequence_{aggregation}", x, **kwargs)
            kwargs = {"ratio_level": "sequence", "kl_coef": 0.1, **options}
            yield _call(f"{name}_sequence_rows", rows, "ref_logps", "rollout_weights", **kwargs)
        yield _call(f"{name}_on_policy", {**x, "old_logps": None}, **options)
    for estimator in ESTIMATORS:
        for coefficient in (0.0, 0.3, -0.1):
            kwargs = {"kl_estimator": estimator, "kl_coef": coefficient}
            yield _call(f"{estimator}_{coefficient}", x, "ref_logps", **kwargs)
    for aggregation in AGGREGATIONS:
        for normalizer in (
            50,
            12.5,
            torch.tensor(33.0),
            torch.tensor(20),
            torch.tensor(7.0, dtype=torch.float64),
        ):
            kind = "tensor" if isinstance(normalizer, torch.Tensor) else "number"
            name = f"normalizer_{kind}_{float(normalizer)}_{aggregation}"
            yield _call(name, x, aggregation=aggregation, normalizer=normalizer)
    yield from _without_coefficients(x)
    yield _call("entropy_measured", x, "entropy")
    yield _call("entropy_frozen", {**x, "logps": x["logps"].detach()}, entropy_coef=0.1)
    yield _call("frozen", {**x, "logps": x["logps"].detach()}, "entropy")


def _without_coefficients(x: dict[str, torch.Tensor]) -> Iterator[Sample]:
    """Terms that are infinite at a token that counts take no part where their coefficient is 0."""
    place = tuple(x["mask"].nonzero()[0])
    infinite = {name: x[name].clone() for name in ("ref_logps", "entropy")}
    infinite["ref_logps"][place], infinite["entropy"][place] = -torch.inf, torch.inf
    for estimator in ESTIMATORS:
        name = f"infinite_{estimator}_without_coefficient"
        yield _call(name, {**x, **infinite}, "ref_logps", kl_estimator=estimator)
    yield _call("infinite_entropy_without_coefficient", {**x, **infinite}, "entropy")


def _spoiled(x: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same with NaN and infinities wherever nothing counts."""
    bad = {"logps": torch.nan, "old_logps": torch.inf, "ref_logps": -torch.inf}
    result = {"mask": mask}
    for name, value in x.items():
        if name != "mask":
            filled = torch.where(mask, value.detach(), bad.get(name, torch.nan))
            result[name] = filled.to(value.dtype).requires_grad_(value.requires_grad)
    return result


def _masked(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(6, 40, dtype)
    some = x["mask"].clone()
    some[2] = False
    everything = ("ref_logps", "rollout_weights")
    for kind, mask in (("dirty", some), ("all_masked", torch.zeros_like(some))):
        dirty = _spoiled(x, mask)
        for name, options in LOSSES.items():
            levels = ("token",) if name == "reinforce" else ("token", "sequence")
            for level in levels:
                kwargs = {"ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.1, **options}
                yield _call(f"{kind}_{name}_{level}", dirty, *everything, **kwargs)
        for aggregation in AGGREGATIONS:
            yield _call(f"{kind}_{aggregation}", dirty, aggregation=aggregation)
        rows = {**dirty, "advantages": x["advantages"][:, 0].clone()}
        rows["advantages"][~mask.any(-1)] = torch.nan
        yield _call(f"{kind}_row_advantages", rows)
    yield _call("int_mask", {**x, "mask": some.long()})
    yield _call("float_mask", {**x, "mask": some.float() * 0.5})


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    """Log-ratios beyond +-20, exactly there, equal, nearly equal; zero advantages."""
    d = torch.tensor([25.0, -25, 20, -20, 19.5, -19.5, 0, 0, 1e-4, -1e-4, 4, -4, 90, -90, 0.5, 1])
    if dtype == torch.float16:  # a gradient of e^20 is beyond its range
        d = d.clamp(-8, 8)
    old = torch.full_like(d, -32.0)
    logps = (old + d).repeat(3, 1).to(dtype).requires_grad_()
    advantages = torch.tensor([1.0, -0.75, 0.0])[:, None].expand(3, 16).contiguous().to(dtype)
    mask = torch.ones(3, 16, dtype=torch.bool)
    x = {
        "logps": logps,
        "old_logps": old.repeat(3, 1).to(dtype),
        "advantages": advantages,
        "mask": mask,
        "ref_logps": old.repeat(3, 1).to(dtype),
    }
    for name, options in LOSSES.items():
        yield _call(f"large_{name}", x, **options)
        for estimator in ESTIMATORS:
            kwargs = {"kl_estimator": estimator, "kl_coef": 0.1, **options}
            yield _call(f"large_{name}_{estimator}", x, "ref_logps", **kwargs)
        if name != "reinforce":
            for shift in (-30.0, 30.0, 1.0):
                old_logps = (logps.detach().float() + shift).to(dtype)
                kwargs = {"ratio_level": "sequence", **options}
                yield _call(f"large_{name}_{shift}", {**x, "old_logps": old_logps}, **kwargs)


def _strided(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(12, 60, dtype)
    names = ("ref_logps", "rollout_weights")
    kwargs = {"kl_coef": 0.1, "entropy_coef": 0.1}
    cuts = {
        "sliced": lambda t: t[1::2, 3:],
        "every_other": lambda t: t[:, ::2],
        "transposed": lambda t: t.t(),
        "expanded_rows": lambda t: t[:1].expand(5, 60),
        "expanded_tokens": lambda t: t[:, :1].expand(12, 21),
    }
    for name, cut in cuts.items():
        yield _call(name, {n: cut(t) for n, t in x.items()}, *names, **kwargs)
    mixed = {**x, "mask": x["mask"].t().contiguous().t(), "advantages": x["advantages"][:, 5]}
    mixed["rollout_weights"] = x["rollout_weights"][:1].expand(12, 60)
    yield _call("mixed_strides", mixed, *names, **kwargs)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(5, 37, dtype)
    yield _call("plain", x)
    one_way = (x["advantages"] + 1)[:, 0]  # losses of both signs would cancel to 1 % of one
    yield _call("grpo", {**x, "advantages": one_way}, "ref_logps", kl_coef=0.04)
    yield _call("gspo", x, ratio_level="sequence", entropy_coef=0.1)
    yield _call("cispo", x, "rollout_weights", loss_type="cispo", normalizer=40.0)
    yield from _options(dtype)
    yield from _masked(dtype)
    yield from _large(dtype)
    yield from _strided(dtype)
    for rows, length in ((1, 1), (6, 1), (1, 5), (3, 15), (3, 16), (3, 17), (40, 200)):
        yield _call(f"{rows}_rows_of_{length}", tokens(rows, length, dtype), "ref_logps")
    for rows, length in ((0, 5), (3, 0), (0, 0)):
        for aggregation in AGGREGATIONS:
            name = f"{rows}_rows_of_{length}_{aggregation}"
            yield _call(name, tokens(rows, length, dtype), aggregation=aggregation)
    long = tokens(2, 5001, dtype)
    yield _call("long", long, "ref_logps", kl_coef=0.1)
    yield _call("long_sequence", long, ratio_level="sequence")
    if dtype in (torch.float32, torch.bfloat16):
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        mixed = {**x, "old_logps": x["old_logps"].to(other), "advantages": x["advantages"].double()}
        yield _call("mixed_dtypes", mixed, "ref_logps", kl_coef=0.1, entropy_coef=0.1)


def of_length(length: int) -> Sample:
    return _call("", tokens(3, length, torch.float32), "ref_logps", kl_coef=0.1, entropy_coef=0.1)


def rejected() -> Iterator[Rejected]:
    x = tokens(3, 5, torch.float32)
    logps, old, adv, mask = (x[n] for n in ("logps", "old_logps", "advantages", "mask"))
    grad = old.clone().requires_grad_()

    def call(name, message, error=ValueError, args=(logps, old, adv, mask), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "logps: expected a tensor", TypeError, ([1.0], old, adv, mask))
    yield call("integers", "logps: expected dtype", TypeError, (mask.long(), old, adv, mask))
    yield call("one_dim", r"logps: .*2 dim.*\(5,\)", args=(logps[0], old[0], adv[0], mask[0]))
    yield call("old_shape", r"old_logps: .*\(3, 5\).*\(2, 5\)", args=(logps, old[:2], adv, mask))
    yield call("old_type", "old_logps: expected a tensor", TypeError, (logps, 0.0, adv, mask))
    yield call("old_grad", "old_logps: .*not require grad", args=(logps, grad, adv, mask))
    yield call("old_device", "old_logps: .*meta", args=(logps, old.to("meta"), adv, mask))
    yield call("adv_shape", r"advantages: .*\(3,\).*\(5,\)", args=(logps, old, adv[0], mask))
    yield call("adv_column", r"advantages: .*\(3, 1\)", args=(logps, old, adv[:, :1], mask))
    yield call("adv_none", "advantages: expected a tensor", TypeError, (logps, old, None, mask))
    yield call("adv_grad", "advantages: .*not require grad", args=(logps, old, grad, mask))
    yield call("mask_shape", r"mask: .*\(3, 5\)", args=(logps, old, adv, mask[:, 0]))
    yield call("mask_none", "mask: expected a tensor", TypeError, (logps, old, adv, None))
    yield call("mask_device", "mask: .*meta", args=(logps, old, adv, mask.to("meta")))
    yield call("loss_type", "loss_type: .*'clip'.*got 'ppo'", loss_type="ppo")
    yield call("ratio_level", "ratio_level: .*'token'.*got 'row'", ratio_level="row")
    yield call("estimator", "kl_estimator: .*'k3'.*got 'k4'", kl_estimator="k4")
    yield call("aggregation", "aggregation: .*'dr_grpo'.*got 'mean'", aggregation="mean")
    for bad in (-0.1, 1.1, float("nan")):
        yield call(f"clip_low_{bad}", r"clip_low: .*in \[0, 1\]", clip_low=bad)
    yield call("clip_high", "clip_high: .*at least 0", clip_high=-0.1)
    yield call("clip_type", "clip_high: expected a number", TypeError, clip_high=None)
    for bad in (1.0, 0.5):
        yield call(f"dual_clip_{bad}", "dual_clip: expected a number above 1", dual_clip=bad)
    yield call("dual_clip_inf", "dual_clip: expected a finite", dual_clip=float("inf"))
    for loss_type in ("cispo", "sapo", "reinforce"):
        kwargs = {"loss_type": loss_type}
        message = f"expected None .{loss_type} has none"
        yield call(f"{loss_type}_dual", f"dual_clip: {message}", dual_clip=3.0, **kwargs)
    for loss_type in ("clip", "cispo", "reinforce"):
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            kwargs = {"loss_type": loss_type, name: 1.0}
            yield call(f"{loss_type}_{name}", f"{name}: expected None .{loss_type}", **kwargs)
    for loss_type in ("sapo", "reinforce"):
        for name in ("clip_low", "clip_high"):
            kwargs = {"loss_type": loss_type, name: 0.3}
            yield call(f"{loss_type}_{name}", f"{name}: expected 0.2, as {loss_type}", **kwargs)
    yield call("tau", "sapo_temperature_pos: .*above 0", loss_type="sapo", sapo_temperature_pos=0.0)
    yield call(
        "reinforce_sequence", "ratio_level: .*reinforce", loss_type="reinforce",
        ratio_level="sequence",
    )  # fmt: skip
    yield call(
        "unbiased_sequence", "kl_estimator: .*'sequence'.*got 'unbiased_k3'", ref_logps=old,
        ratio_level="sequence", kl_estimator="unbiased_k3",
    )  # fmt: skip
    yield call("kl_coef", "ref_logps: expected a tensor, as kl_coef", kl_coef=0.1)
    yield call("kl_nan", "kl_coef: expected a finite", kl_coef=float("nan"))
    yield call("ref_grad", "ref_logps: .*not require grad", ref_logps=grad)
    yield call("ref_shape", r"ref_logps: .*\(3, 5\)", ref_logps=old[0])
    yield call("entropy_coef", "entropy: expected a tensor, as entropy_coef", entropy_coef=0.1)
    yield call("entropy_shape", r"entropy: .*\(3, 5\)", entropy=old[:, 1:])
    yield call("entropy_inf", "entropy_coef: expected a finite", entropy_coef=float("inf"))
    yield call("weights", r"rollout_weights: .*\(3,\).*\(2,\)", rollout_weights=old[0, :2])
    yield call("weights_grad", "rollout_weights: .*not require grad", rollout_weights=grad)
    for bad in (0.0, -1.0, float("nan")):
        yield call(f"normalizer_{bad}", "normalizer: .*above 0", normalizer=bad)
    yield call("normalizer_dims", "normalizer: expected 0 dim", normalizer=torch.ones(1))
    yield call("normalizer_grad", "normalizer: .*not require grad", normalizer=grad.sum())
    yield call("normalizer_device", "normalizer: .*meta", normalizer=torch.ones((), device="meta"))
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped loss as trainers write it, and the metrics that they log."""
    log_ratio = (logps - old_logps).clamp(-20, 20)
    ratio = log_ratio.exp()
    adv = advantages.unsqueeze(-1)
    tokens = mask.sum().clamp(min=1)
    plain, held = -adv * ratio, -adv * ratio.clamp(0.8, 1.2)
    loss = (torch.maximum(plain, held) * mask).sum() / tokens
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum() / tokens,
            "ppo_kl": (-log_ratio * mask).sum() / tokens,
            "clip_fraction": ((held > plain) & mask).sum() / tokens,
        }
    return loss, metrics


def _benchmark(rows: int, length: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = tokens(rows, length, dtype)
        return _call("", {**x, "advantages": x["advantages"][:, 0].contiguous()})

    return Benchmark(
        name=f"{rows} x {length}",
        make=make,
        eager=eager,
        # forward reads two log-probabilities and the mask and writes the gradient, which backward
        # reads and scales
        bytes_moved=lambda s: s.args[0].numel() * (2 * s.args[0].element_size() + 5),
        backward_bytes_moved=lambda s: s.args[0].numel() * 8,
        devices=devices,
    )


OP = Op(
    name="policy_loss",
    function=policy_loss,
    reference=reference.policy_loss,
    kernels=("policy_loss_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Schulman 2017, Shao 2024",
    summary="losses of PPO, GRPO and their family, with their metrics",
    benchmarks=(_benchmark(8, 256), _benchmark(64, 2048), _benchmark(256, 8192, devices=("cuda",))),
)
