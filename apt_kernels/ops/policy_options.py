"""What the losses of policy optimisation share: their options, checked and as kernels take them."""

from __future__ import annotations

import math

from torch import Tensor

from .. import checks
from .tokens import AGGREGATIONS

_LOSS_TYPES = {"clip": 0, "cispo": 1, "sapo": 2, "reinforce": 3}
_RATIO_LEVELS = {"token": 0, "sequence": 1}
_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
METRICS = (
    "policy_loss", "approx_kl", "ppo_kl", "clip_fraction", "dual_clip_fraction", "ref_kl",
    "entropy",
)  # fmt: skip
_DEFAULT_CLIP, _DEFAULT_TAU_POS, _DEFAULT_TAU_NEG = 0.2, 1.0, 1.05


def check_options(
    loss_type: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    sapo_temperature_pos: float | None,
    sapo_temperature_neg: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    aggregation: str,
) -> None:
    checks.choice("loss_type", loss_type, _LOSS_TYPES)
    checks.choice("ratio_level", ratio_level, _RATIO_LEVELS)
    checks.choice("kl_estimator", kl_estimator, _ESTIMATORS)
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    checks.between("clip_low", clip_low, 0, 1)
    checks.at_least_zero("clip_high", clip_high)
    checks.finite("kl_coef", kl_coef)
    checks.finite("entropy_coef", entropy_coef)
    if loss_type in ("sapo", "reinforce"):
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            if value != _DEFAULT_CLIP:
                raise ValueError(
                    f"{name}: expected {_DEFAULT_CLIP}, as {loss_type} has no clip, got {value}"
                )
    if dual_clip is not None:
        if loss_type != "clip":
            checks.unused("dual_clip", dual_clip, f"{loss_type} has none")
        checks.finite("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    for name, value in (
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
    ):
        if value is not None:
            if loss_type != "sapo":
                checks.unused(name, value, f"{loss_type} has none")
            checks.positive(name, value)
    if ratio_level == "sequence" and loss_type == "reinforce":
        raise ValueError("ratio_level: expected 'token', as reinforce has no ratio, got 'sequence'")


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


def kernel_options(
    loss_type: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    sapo_temperature_pos: float | None,
    sapo_temperature_neg: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    aggregation: str,
) -> tuple[int | float, ...]:
    """The options as the kernel takes them, in its order."""
    return (
        _LOSS_TYPES[loss_type],
        _RATIO_LEVELS[ratio_level],
        _ESTIMATORS[kl_estimator],
        AGGREGATIONS[aggregation],
        float(clip_low),
        float(clip_high),
        math.inf if dual_clip is None else float(dual_clip),
        _DEFAULT_TAU_POS if sapo_temperature_pos is None else float(sapo_temperature_pos),
        _DEFAULT_TAU_NEG if sapo_temperature_neg is None else float(sapo_temperature_neg),
        float(kl_coef),
        float(entropy_coef),
    )
