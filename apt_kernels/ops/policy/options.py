"""The options that both losses of policy optimisation share: checked, as kernels take them, and
as a module holds them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ... import checks
from ...codes import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSS_TYPES, RATIO_LEVELS
from ..common.module import LossModule

METRICS = (
    "policy_loss", "approx_kl", "ppo_kl", "clip_fraction", "dual_clip_fraction", "ref_kl",
    "entropy",
)  # fmt: skip
_DEFAULT_CLIP, _DEFAULT_TEMPERATURE_POS, _DEFAULT_TEMPERATURE_NEG = 0.2, 1.0, 1.05


class PolicyOptions(NamedTuple):
    """The options of `policy_loss`, by the names that its docstring explains."""

    loss_type: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    ratio_level: str
    sapo_temperature_pos: float | None
    sapo_temperature_neg: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    aggregation: str


def check_options(options: PolicyOptions) -> None:
    loss_type = options.loss_type
    checks.choice("loss_type", loss_type, POLICY_LOSS_TYPES)
    checks.choice("ratio_level", options.ratio_level, RATIO_LEVELS)
    checks.choice("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    checks.choice("aggregation", options.aggregation, AGGREGATIONS)
    checks.between("clip_low", options.clip_low, 0, 1)
    checks.at_least_zero("clip_high", options.clip_high)
    checks.finite("kl_coef", options.kl_coef)
    checks.finite("entropy_coef", options.entropy_coef)
    if loss_type in ("sapo", "reinforce"):
        for name, bound in (("clip_low", options.clip_low), ("clip_high", options.clip_high)):
            if bound != _DEFAULT_CLIP:
                raise ValueError(
                    f"{name}: expected {_DEFAULT_CLIP}, as {loss_type} has no clip, got {bound}"
                )
    if options.dual_clip is not None:
        if loss_type != "clip":
            checks.unused("dual_clip", options.dual_clip, f"{loss_type} has none")
        checks.finite("dual_clip", options.dual_clip)
        if options.dual_clip <= 1:
            raise ValueError(f"dual_clip: expected a number above 1, got {options.dual_clip}")
    for name, value in (
        ("sapo_temperature_pos", options.sapo_temperature_pos),
        ("sapo_temperature_neg", options.sapo_temperature_neg),
    ):
        if value is not None:
            if loss_type != "sapo":
                checks.unused(name, value, f"{loss_type} has none")
            checks.positive(name, value)
    if options.ratio_level == "sequence" and loss_type == "reinforce":
        raise ValueError("ratio_level: expected 'token', as reinforce has no ratio, got 'sequence'")
    if options.ratio_level == "sequence" and options.kl_estimator == "unbiased_k3":
        raise ValueError(
            "kl_estimator: expected 'k1', 'k2' or 'k3' with ratio_level 'sequence', as unbiased_k3 "
            "needs the ratio of each token, got 'unbiased_k3'"
        )


def check_tensors(
    like_name: str,
    like: Tensor,
    *,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None,
    kl_coef: float,
    rollout_weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> None:
    """Checks the tensors without a gradient; the argument `like_name` gives the shape `(B, T)`."""
    if old_logps is not None:
        checks.pair("old_logps", old_logps, like_name, like, constant_=True)
    checks.per_row_or_token("advantages", advantages, like_name, like)
    checks.token_mask("mask", mask, like_name, like)
    if ref_logps is not None:
        checks.pair("ref_logps", ref_logps, like_name, like, constant_=True)
    elif kl_coef:
        raise ValueError("ref_logps: expected a tensor, as kl_coef is not 0, got None")
    if rollout_weights is not None:
        checks.per_row_or_token("rollout_weights", rollout_weights, like_name, like)
    checks.normalizer(normalizer, like_name, like)


def kernel_options(options: PolicyOptions) -> dict[str, Any]:
    """The options as fields of a kernel's call: words as integers, None as the number it means."""
    dual_clip = options.dual_clip
    temperature_pos, temperature_neg = options.sapo_temperature_pos, options.sapo_temperature_neg
    return {
        "loss_type": POLICY_LOSS_TYPES[options.loss_type],
        "ratio_level": RATIO_LEVELS[options.ratio_level],
        "kl_estimator": KL_ESTIMATORS[options.kl_estimator],
        "aggregation": AGGREGATIONS[options.aggregation],
        "clip_low": float(options.clip_low),
        "clip_high": float(options.clip_high),
        "dual_clip": math.inf if dual_clip is None else float(dual_clip),
        "sapo_temperature_pos": (
            _DEFAULT_TEMPERATURE_POS if temperature_pos is None else float(temperature_pos)
        ),
        "sapo_temperature_neg": (
            _DEFAULT_TEMPERATURE_NEG if temperature_neg is None else float(temperature_neg)
        ),
        "kl_coef": float(options.kl_coef),
        "entropy_coef": float(options.entropy_coef),
    }


class PolicyModule(LossModule):
    """The base of `PolicyLoss` and `LinearPolicyLoss`: their options are the same."""

    def __init__(
        self,
        loss_type: str = "clip",
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        ratio_level: str = "token",
        sapo_temperature_pos: float | None = None,
        sapo_temperature_neg: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        aggregation: str = "token_mean",
        backend: str | None = None,
    ) -> None:
        options = PolicyOptions(
            loss_type=loss_type,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            ratio_level=ratio_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
            aggregation=aggregation,
        )
        check_options(options)
        super().__init__(**options._asdict(), backend=backend)
