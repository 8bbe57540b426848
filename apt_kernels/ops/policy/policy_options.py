"""What the losses of policy optimisation share: their options, checked and as kernels take them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ... import checks
from ..common.token_inputs import AGGREGATIONS

_LOSS_TYPES = {"clip": 0, "cispo": 1, "sapo": 2, "reinforce": 3}
_RATIO_LEVELS = {"token": 0, "sequence": 1}
_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "unbiased_k3": 4}
METRICS = (
    "policy_loss", "approx_kl", "ppo_kl", "clip_fraction", "dual_clip_fraction", "ref_kl",
    "entropy",
)  # fmt: skip
_DEFAULT_CLIP, _DEFAULT_TAU_POS, _DEFAULT_TAU_NEG = 0.2, 1.0, 1.05


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
    checks.choice("loss_type", loss_type, _LOSS_TYPES)
    checks.choice("ratio_level", options.ratio_level, _RATIO_LEVELS)
    checks.choice("kl_estimator", options.kl_estimator, _ESTIMATORS)
    checks.choice("aggregation", options.aggregation, AGGREGATIONS)
    checks.between("clip_low", options.clip_low, 0, 1)
    checks.at_least_zero("clip_high", options.clip_high)
    checks.finite("kl_coef", options.kl_coef)
    checks.finite("entropy_coef", options.entropy_coef)
    if loss_type in ("sapo", "reinforce"):
        for name, value in (("clip_low", options.clip_low), ("clip_high", options.clip_high)):
            if value != _DEFAULT_CLIP:
                raise ValueError(
                    f"{name}: expected {_DEFAULT_CLIP}, as {loss_type} has no clip, got {value}"
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
    name: str,
    like: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None,
    kl_coef: float,
    rollout_weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> None:
    """Tensors without a gradient; like `(B, T)`: the argument `name`, whose shape they share."""
    if old_logps is not None:
        checks.pair("old_logps", old_logps, name, like, constant_=True)
    checks.per_row_or_token("advantages", advantages, name, like)
    checks.token_mask("mask", mask, name, like)
    if ref_logps is not None:
        checks.pair("ref_logps", ref_logps, name, like, constant_=True)
    elif kl_coef:
        raise ValueError("ref_logps: expected a tensor, as kl_coef is not 0, got None")
    if rollout_weights is not None:
        checks.per_row_or_token("rollout_weights", rollout_weights, name, like)
    checks.normalizer(normalizer, name, like)


def kernel_options(options: PolicyOptions) -> tuple[int | float, ...]:
    """The options as the kernel takes them, in its order."""
    tau_pos, tau_neg = options.sapo_temperature_pos, options.sapo_temperature_neg
    return (
        _LOSS_TYPES[options.loss_type],
        _RATIO_LEVELS[options.ratio_level],
        _ESTIMATORS[options.kl_estimator],
        AGGREGATIONS[options.aggregation],
        float(options.clip_low),
        float(options.clip_high),
        math.inf if options.dual_clip is None else float(options.dual_clip),
        _DEFAULT_TAU_POS if tau_pos is None else float(tau_pos),
        _DEFAULT_TAU_NEG if tau_neg is None else float(tau_neg),
        float(options.kl_coef),
        float(options.entropy_coef),
    )
