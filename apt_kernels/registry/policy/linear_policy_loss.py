"""linear_policy_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.policy.linear_policy_loss import linear_policy_loss
from ..common.heads import hidden_and_weight, ids, normal
from ..entry import Benchmark, Op, Rejected, Sample
from . import policy_loss

ARGUMENTS = ("hidden", "weight", "token_ids", "old_logps", "advantages", "mask")


def tokens(
    rows: int,
    length: int,
    dtype: torch.dtype,
    *,
    features: int = 24,
    vocab: int = 37,
    scale: float = 1.0,
    **head,
) -> dict:
    """Every tensor argument; old_logps spread about the log-probabilities of the head.

    Means of what has either sign are kept away from 0: there an error relative to the result says
    nothing but how the rounding of the logits, the same in every implementation, happens to add up.
    """
    hidden, weight = hidden_and_weight(
        rows, length, features=features, vocab=vocab, dtype=dtype, scale=scale
    )
    token_ids = ids(rows, length, vocab=vocab)
    logps = reference.linear_token_logprobs(
        hidden.detach().float(), weight.detach().float(), token_ids, **head
    )
    noise = torch.float32 if dtype == torch.float64 else dtype
    shape = (rows, length)
    return {
        "hidden": hidden,
        "weight": weight,
        "token_ids": token_ids,
        "old_logps": logps - 0.15 + normal(*shape, dtype=torch.float32, scale=0.3, seed=2),
        "advantages": normal(*shape, dtype=noise, seed=3) + 0.5,
        "mask": normal(*shape, dtype=torch.float32, seed=4) > -0.5,
        "ref_logps": logps - 0.3 + normal(*shape, dtype=torch.float32, scale=0.5, seed=5),
        "rollout_weights": normal(*shape, dtype=noise, seed=6).abs(),
    }


def _call(name: str, x: dict, *names: str, **options) -> Sample:
    """A call with the required tensors and the tensors that `names` lists."""
    return Sample(name, tuple(x[n] for n in ARGUMENTS), {n: x[n] for n in names} | options)


def _frozen(x: dict, *names: str) -> dict:
    return {**x, **{n: x[n].detach() for n in names}}


def _losses(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(4, 9, dtype)
    bias = normal(37, dtype=dtype, scale=0.1, seed=7).requires_grad_()
    everything = {"kl_coef": 0.1, "entropy_coef": 0.05, "bias": bias}
    for name, options in policy_loss.LOSSES.items():
        # sapo weighs either sign by a temperature of its own: its sums cancel more than the others'
        offset = 1.0 if name.startswith("sapo") else 0.0
        y = {**x, "advantages": x["advantages"] + offset}
        yield _call(name, y, **options)
        yield _call(f"{name}_all", y, "ref_logps", "rollout_weights", **everything, **options)
        if name != "reinforce":
            kwargs = {"ratio_level": "sequence", **everything, **options}
            yield _call(f"{name}_sequence", y, "ref_logps", "rollout_weights", **kwargs)
        frozen = _frozen(y, "weight")
        yield _call(f"{name}_frozen_head", frozen, "ref_logps", kl_coef=0.1, **options)
    for aggregation in policy_loss.AGGREGATIONS:
        for level in ("token", "sequence"):
            kwargs = {"aggregation": aggregation, "ratio_level": level}
            yield _call(f"{level}_{aggregation}", x, **kwargs)
        for normalizer in (12.5, torch.tensor(20)):
            kwargs = {"aggregation": aggregation, "normalizer": normalizer}
            yield _call(f"normalizer_{type(normalizer).__name__}_{aggregation}", x, **kwargs)
    for estimator in policy_loss.ESTIMATORS:
        kwargs = {"kl_estimator": estimator, "kl_coef": 0.3}
        yield _call(estimator, x, "ref_logps", **kwargs)
    rows = {n: x[n][:, 0] for n in ("advantages", "rollout_weights")}
    yield _call("per_row", {**x, **rows}, "rollout_weights", ratio_level="sequence")
    yield _call("ref_measured", x, "ref_logps")
    for level in ("token", "sequence"):
        yield _call(f"on_policy_{level}", {**x, "old_logps": None}, ratio_level=level)
    far = {**x, "old_logps": x["old_logps"] - 30}
    yield _call("beyond_the_bound", far, clip_low=0.0, clip_high=0.0, entropy_coef=0.1)


def _heads(dtype: torch.dtype) -> Iterator[Sample]:
    per_token = torch.linspace(0.4, 2.0, 15).view(3, 5)
    for name, head in (
        ("temperature", {"temperature": 0.7}),
        ("temperature_per_token", {"temperature": per_token}),
        ("softcap", {"softcap": 5.0, "temperature": 1.3}),
        ("logit_scale", {"logit_scale": 0.5}),
    ):
        x = tokens(3, 5, dtype, **head)
        for level in ("token", "sequence"):
            options = {"entropy_coef": 0.1, "ratio_level": level, **head}
            yield _call(f"{name}_{level}", x, **options)
    x = tokens(3, 5, dtype)
    bias = normal(37, dtype=dtype, scale=0.1, seed=7).requires_grad_()
    for name, frozen in (
        ("frozen_head", ("weight",)),
        ("frozen_hidden", ("hidden",)),
        ("frozen", ("hidden", "weight")),
    ):
        for level in ("token", "sequence"):
            options = {"entropy_coef": 0.1, "ratio_level": level}
            yield _call(f"{name}_{level}", _frozen(x, *frozen), **options)
        yield _call(f"{name}_bias", _frozen(x, *frozen), bias=bias)
    for vocab in (1, 2, 17, 1025, 30522):
        x = tokens(1, 3, dtype, vocab=vocab, features=8 if vocab > 10_000 else 33)
        x["mask"] = torch.ones(1, 3, dtype=torch.bool)
        yield _call(f"vocabulary_of_{vocab}", x, entropy_coef=0.1)
    x = tokens(7, 100, dtype, vocab=1100, features=5)  # several chunks, blocks and tiles
    for level in ("token", "sequence"):
        yield _call(f"several_tiles_{level}", x, ratio_level=level)
    yield _call("several_tiles_frozen_head", _frozen(x, "weight"))
    excluded = normal(1500, dtype=dtype, scale=0.1, seed=8)
    excluded[:700] = -torch.inf
    x = tokens(1, 3, dtype, vocab=1500)
    x["token_ids"] = torch.tensor([[700, 1499, 900]])
    x["old_logps"] = torch.full((1, 3), -7.0)
    yield _call("excluded_columns", x, bias=excluded, entropy_coef=0.1)


def _masked(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(4, 9, dtype)
    x["mask"][2] = False
    for name, mask in (("dirty", x["mask"]), ("all_masked", torch.zeros_like(x["mask"]))):
        dirty = {**x, "mask": mask, "token_ids": x["token_ids"].masked_fill(~mask, -100)}
        for n in ("old_logps", "advantages", "ref_logps", "rollout_weights"):
            dirty[n] = x[n].masked_fill(~mask, torch.nan)
        hidden = x["hidden"].detach().masked_fill(~mask.unsqueeze(-1), torch.inf)
        dirty["hidden"] = hidden.requires_grad_()
        heat = torch.ones(4, 9).masked_fill(~mask, torch.nan)
        for level in ("token", "sequence"):
            options = {"ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.1}
            frozen = _frozen(dirty, "weight")
            for kind, given in (("", dirty), ("_frozen_head", frozen)):
                yield _call(
                    f"{name}_{level}{kind}", given, "ref_logps", "rollout_weights",
                    temperature=heat, **options,
                )  # fmt: skip
        for aggregation in policy_loss.AGGREGATIONS:
            yield _call(f"{name}_{aggregation}", dirty, aggregation=aggregation)
    yield _call("int_mask", {**x, "mask": x["mask"].long()})


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x = tokens(3, 7, dtype)
    yield _call("plain", x)
    yield _call("grpo", {**x, "advantages": x["advantages"][:, 0]}, "ref_logps", kl_coef=0.04)
    yield _call("gspo", x, ratio_level="sequence", entropy_coef=0.1)
    yield _call("frozen_head", _frozen(x, "weight"), "rollout_weights", loss_type="cispo")
    yield from _losses(dtype)
    yield from _heads(dtype)
    yield from _masked(dtype)
    x = tokens(8, 12, dtype)
    cuts = {
        "sliced": lambda t: t[1::2, 3:],
        "transposed": lambda t: t.transpose(0, 1),
        "expanded": lambda t: t[:1].expand(5, *t.shape[1:]),
    }
    for name, cut in cuts.items():
        cutout = {n: t if n == "weight" else cut(t) for n, t in x.items()}
        yield _call(name, cutout, "ref_logps", "rollout_weights", kl_coef=0.1)
    mixed = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    weight = x["weight"].detach().to(mixed).requires_grad_()
    yield _call("mixed_dtypes", {**x, "weight": weight, "advantages": x["advantages"].double()})
    for rows, length in ((1, 1), (0, 5), (3, 0), (0, 0)):
        empty = tokens(rows, length, dtype)
        for level in ("token", "sequence"):
            yield _call(f"{rows}_rows_of_{length}_{level}", empty, ratio_level=level)


def of_length(length: int) -> Sample:
    x = tokens(2, length, torch.float32, features=8, vocab=33)
    return _call("", x, "ref_logps", kl_coef=0.1, entropy_coef=0.1)


def rejected() -> Iterator[Rejected]:
    x = tokens(2, 3, torch.float32, features=8, vocab=5)
    x["mask"] = torch.ones(2, 3, dtype=torch.bool)

    def wrong(name: str, message: str, error: type[Exception] = ValueError, **kwargs) -> Rejected:
        arguments = {**{n: x[n] for n in ARGUMENTS}, **kwargs}
        args = tuple(arguments.pop(n) for n in ARGUMENTS)
        return Rejected(name, args, arguments, error, message)

    h, w, token_ids, old = (x[n] for n in ("hidden", "weight", "token_ids", "old_logps"))
    grad = old.clone().requires_grad_()
    yield wrong("not_a_tensor", "hidden: expected a tensor", TypeError, hidden=[1.0])
    yield wrong("two_dims", "hidden: expected 3 dim", hidden=h[0], token_ids=token_ids[0])
    yield wrong("weight_shape", r"weight: .*\(V, 8\).*\(5, 7\)", weight=w[:, :7])
    yield wrong("bias_shape", r"bias: .*\(5,\).*\(4,\)", bias=torch.randn(4))
    yield wrong("float_ids", "token_ids: expected dtype int64", TypeError, token_ids=old)
    yield wrong("id_shape", r"token_ids: .*\(2, 3\).*\(2, 2\)", token_ids=token_ids[:, :2])
    yield wrong("id_too_large", r"token_ids: .*\[0, 5\).* in row 0", token_ids=token_ids + 5)
    yield wrong("id_negative", "token_ids: .*-100 in row", token_ids=token_ids * 0 - 100)
    yield wrong("temperature", "temperature: .*above 0", temperature=0.0)
    yield wrong("temperature_shape", r"temperature: .*\(2, 3\)", temperature=torch.ones(3))
    yield wrong("softcap", "softcap: .*above 0", softcap=-1.0)
    yield wrong("logit_scale", "logit_scale: .*above 0", logit_scale=0.0)
    yield wrong("old_shape", r"old_logps: .*\(2, 3\).*\(1, 3\)", old_logps=old[:1])
    yield wrong("old_grad", "old_logps: .*not require grad", old_logps=grad)
    yield wrong("adv_shape", r"advantages: .*\(2,\).*\(3,\)", advantages=old[0])
    yield wrong("adv_grad", "advantages: .*not require grad", advantages=grad)
    yield wrong("mask_shape", r"mask: .*\(2, 3\)", mask=x["mask"][:, 0])
    yield wrong("mask_none", "mask: expected a tensor", TypeError, mask=None)
    yield wrong("ref_grad", "ref_logps: .*not require grad", ref_logps=grad)
    yield wrong("kl_coef", "ref_logps: expected a tensor, as kl_coef", kl_coef=0.1)
    yield wrong("weights", r"rollout_weights: .*\(2,\).*\(3,\)", rollout_weights=old[0])
    yield wrong("entropy_coef", "entropy_coef: expected a finite", entropy_coef=float("nan"))
    yield wrong("loss_type", "loss_type: .*'clip'.*got 'ppo'", loss_type="ppo")
    yield wrong("aggregation", "aggregation: .*'dr_grpo'.*got 'mean'", aggregation="mean")
    yield wrong("dual_clip", "dual_clip: .*cispo has none", dual_clip=3.0, loss_type="cispo")
    yield wrong("normalizer", "normalizer: .*above 0", normalizer=0.0)
    yield wrong("backend", "backend: .*'fastest'", backend="fastest")


def eager(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as trainers write it: all logits, their log-softmax, the clipped loss, metrics."""
    logps = F.linear(hidden, weight).log_softmax(-1)
    chosen = logps.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    loss, metrics = policy_loss.eager(chosen, old, advantages, mask)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
        metrics["entropy"] = (entropy * mask).sum() / mask.sum().clamp(min=1)
    return loss, metrics


def _benchmark(rows: int, length: int, features: int, vocab: int, frozen: bool) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = tokens(rows, length, dtype, features=features, vocab=vocab)
        x["advantages"] = x["advantages"][:, 0].contiguous()
        x["mask"] = torch.ones(rows, length, dtype=torch.bool)
        return _call("", _frozen(x, "weight") if frozen else x)

    return Benchmark(
        name=f"{rows * length} x {features} x {vocab}{', frozen head' * frozen}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # the weight is read and its gradient written in the forward pass; nothing afterwards
        bytes_moved=lambda s: (
            (1 + s.args[1].requires_grad) * s.args[1].numel() * s.args[1].element_size()
        ),
        backward_bytes_moved=lambda s: 0,
        flops=lambda s: 2 * rows * length * features * vocab,
        backward_flops=lambda s: (2 if frozen else 4) * rows * length * features * vocab,
    )


OP = Op(
    name="linear_policy_loss",
    function=linear_policy_loss,
    reference=reference.linear_policy_loss,
    kernels=("linear_policy_loss_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("hidden", "weight", "bias"),
    source="Schulman 2017; Wijmans 2024",
    summary="policy_loss from hidden states, gradient formed in the forward pass",
    benchmarks=(
        _benchmark(8, 128, 576, 49152, frozen=False),
        _benchmark(8, 128, 576, 49152, frozen=True),
    ),
)
