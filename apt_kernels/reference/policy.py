"""Losses of policy optimisation: PPO, GRPO and their family, values, KL penalties, advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import linear_token_logprobs
from .numerics import accumulate_dtype, aggregate, at_least_one, keep

LOG_RATIO_BOUND = 20.0  # e^20 = 4.9e8: beyond it a ratio says nothing and its exponential overflows


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    sapo_temperature_pos: float | None = None,
    sapo_temperature_neg: float | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the aggregate of w * surrogate + kl_coef * kl - entropy_coef * entropy, and metrics.

    With x = clamp(logps - old_logps, -20, 20), r = exp(x), A the advantage, sg(.) without
    gradient, t the SAPO temperature of the sign of A:

    | loss_type | surrogate of a token                           | source           |
    |-----------|------------------------------------------------|------------------|
    | clip      | -A clamp(r, max=1+clip_high) for A >= 0,       | Schulman 2017,   |
    |           | -A clamp(r, 1-clip_low, dual_clip) for A < 0   | Ye 2020, Yu 2025 |
    | cispo     | -A sg(clamp(r, 1-clip_low, 1+clip_high)) logps | MiniMax 2025     |
    | sapo      | -A 4/t sigmoid(t (r - 1))                      | Gao 2025         |
    | reinforce | -A logps                                       | Williams 1992    |

    `ratio_level="sequence"` is GSPO (Zheng 2025, eq. 14): x becomes its mean over the row's
    tokens, and r_t = exp(sg(x) + logps_t - sg(logps_t)): each token answers for its own gradient.

    | aggregation   | loss, n_i tokens in row i                  | denominator (`normalizer`) |
    |---------------|--------------------------------------------|----------------------------|
    | token_mean    | sum l / denominator (DAPO, BNPO)           | tokens that count          |
    | token_sum     | sum l / denominator                        | 1                          |
    | sequence_mean | sum_i (1/n_i sum_t l) / denominator (GRPO) | rows with tokens           |
    | sequence_sum  | sum l / denominator (LUSPO)                | rows with tokens           |
    | dr_grpo       | sum l / denominator (Liu 2025)             | rows with tokens times T   |

    Args:
        logps: `(B, T)`, differentiable.
        old_logps: `(B, T)`; None: those of the policy itself, a ratio of 1.
        advantages: `(B,)` or `(B, T)`.
        mask: `(B, T)`, True counts. What masked slots hold, in any argument, does not matter.
        loss_type: a row of the first table.
        clip_low: how far below 1 the ratio may fall.
        clip_high: how far above 1 the ratio may rise.
        dual_clip: the largest ratio that counts where the advantage is negative; above 1.
        ratio_level: "token" or "sequence".
        sapo_temperature_pos: 1.0 unless given.
        sapo_temperature_neg: 1.05 unless given.
        ref_logps: `(B, T)`, for the KL term.
        kl_coef: weight of the KL term.
        kl_estimator: "k1", "k2" or "k3", see `kl_penalty`; or "unbiased_k3": r k3, which has the
            expectation and gradient of the KL over tokens of the old policy (DeepSeek-AI 2025,
            DeepSeek-V3.2, section 3.1).
        entropy: `(B, T)`, differentiable.
        entropy_coef: weight of the entropy bonus.
        rollout_weights: `(B,)` or `(B, T)`, w above: correction for what sampled the tokens.
        aggregation: a row of the second table.
        normalizer: replaces the denominator (batches split over steps or devices).

    Returns:
        `(loss, metrics)`. Metrics are 0-dim and detached: `policy_loss` (the aggregate of the
        surrogate alone); means over the tokens that count of `approx_kl` (r - 1 - log r),
        `ppo_kl` (-log r), `clip_fraction`, `dual_clip_fraction`, `ref_kl` and `entropy`. No token
        that counts: 0.
    """
    dtype = accumulate_dtype(logps)
    mask = mask.bool()

    def per_token(values: Tensor) -> Tensor:
        values = values.detach().to(dtype)
        return keep(mask, (values.unsqueeze(-1) if values.dim() == 1 else values).expand_as(mask))

    logps = keep(mask, logps.to(dtype))
    old = logps.detach() if old_logps is None else per_token(old_logps)
    adv = per_token(advantages)
    token_log_ratio = _clamped(logps - old)
    log_ratio = token_log_ratio
    if ratio_level == "sequence":
        mean = (logps - old).detach().sum(-1, keepdim=True) / at_least_one(mask.sum(-1, True))
        log_ratio = _clamped(mean + (logps - logps.detach()))
    ratio = torch.exp(log_ratio)
    surrogate, clipped, dual_clipped = _surrogate(
        loss_type,
        logps,
        ratio,
        adv,
        (1 - clip_low, 1 + clip_high, torch.inf if dual_clip is None else dual_clip),
        (sapo_temperature_pos or 1.0, sapo_temperature_neg or 1.05),
    )
    if rollout_weights is not None:
        surrogate = surrogate * per_token(rollout_weights)
    total = surrogate
    zero = torch.zeros_like(logps.detach())
    kl = bonus = zero
    if ref_logps is not None:
        kl = kl_penalty(logps, per_token(ref_logps), kl_estimator.removeprefix("unbiased_"))
        if kl_estimator == "unbiased_k3":
            kl = kl * ratio
        total = total + kl_coef * kl if kl_coef else total
    if entropy is not None:
        bonus = keep(mask, entropy.to(dtype))
        total = total - entropy_coef * bonus if entropy_coef else total
    loss = aggregate(total, mask, aggregation, normalizer)
    x = token_log_ratio.detach()
    means = {
        "approx_kl": torch.expm1(x) - x,
        "ppo_kl": -x,
        "clip_fraction": clipped.to(dtype),
        "dual_clip_fraction": dual_clipped.to(dtype),
        "ref_kl": kl.detach(),
        "entropy": bonus.detach(),
    }
    tokens = at_least_one(mask.sum())
    metrics = {"policy_loss": aggregate(surrogate.detach(), mask, aggregation, normalizer)}
    metrics |= {name: keep(mask, values).sum() / tokens for name, values in means.items()}
    return loss, metrics


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _surrogate(
    loss_type: str,
    logps: Tensor,
    ratio: Tensor,
    adv: Tensor,
    bounds: tuple[float, float, float],
    sapo_temperatures: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the surrogate and where the ratio was clipped, by its range and by the dual clip."""
    low, high, dual = bounds
    r = ratio.detach()
    none = torch.zeros_like(r, dtype=torch.bool)
    if loss_type == "reinforce":
        return -adv * logps, none, none
    if loss_type == "sapo":
        positive, negative = (torch.full_like(adv, t) for t in sapo_temperatures)
        t = torch.where(adv > 0, positive, negative)
        return -adv * (4 / t) * torch.sigmoid(t * (ratio - 1)), none, none
    if loss_type == "cispo":
        return -adv * r.clamp(low, high) * logps, (r < low) | (r > high), none
    bounded = torch.where(adv < 0, ratio.clamp(low, dual), ratio.clamp(max=high))
    clipped = ((adv > 0) & (r > high)) | ((adv < 0) & (r < low))
    return -adv * bounded, clipped, (adv < 0) & (r > dual)


def kl_penalty(
    logps: Tensor, ref_logps: Tensor, estimator: str = "k3", *, mask: Tensor | None = None
) -> Tensor:
    """Returns an estimate of KL(policy || reference) at each token, from d = logps - ref_logps.

    "k1": d; "k2": d^2 / 2; "k3": exp(x) - 1 - x with x = clamp(-d, -20, 20). Source: Schulman
    2020, "Approximating KL divergence".

    Args:
        logps: any shape, differentiable.
        ref_logps: the same shape.
        estimator: "k1", "k2" or "k3".
        mask: the same shape, True counts; 0 elsewhere.
    """
    dtype = accumulate_dtype(logps)
    d = keep(mask, logps.to(dtype)) - keep(mask, ref_logps.detach().to(dtype))
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    x = _clamped(-d)
    return torch.expm1(x) - x


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_type: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    sapo_temperature_pos: float | None = None,
    sapo_temperature_neg: float | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns `policy_loss` of the log-probabilities and entropies of hidden states.

    Args:
        hidden: `(B, T, D)`, differentiable.
        weight: `(V, D)`, differentiable.
        token_ids: `(B, T)`.
        old_logps: `(B, T)` or None.
        advantages: `(B,)` or `(B, T)`.
        mask: `(B, T)`, True counts.
        bias: `(V,)` or None, differentiable.
        temperature: as in `linear_token_logprobs`; also `softcap` and `logit_scale`.
        softcap: the bound of the tanh cap, or None.
        logit_scale: a factor of the logits.
        loss_type: as in `policy_loss`; also all that follows.
        clip_low: see `policy_loss`.
        clip_high: see `policy_loss`.
        dual_clip: see `policy_loss`.
        ratio_level: see `policy_loss`.
        sapo_temperature_pos: see `policy_loss`.
        sapo_temperature_neg: see `policy_loss`.
        ref_logps: see `policy_loss`.
        kl_coef: see `policy_loss`.
        kl_estimator: see `policy_loss`.
        entropy_coef: weight of the entropy of the full distribution.
        rollout_weights: see `policy_loss`.
        aggregation: see `policy_loss`.
        normalizer: see `policy_loss`.

    Returns:
        `(loss, metrics)`; the metric `entropy` is always measured.
    """
    logps, entropy = linear_token_logprobs(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        return_entropy=True,
    )
    return policy_loss(
        logps,
        old_logps,
        advantages,
        mask,
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy=entropy,
        entropy_coef=entropy_coef,
        rollout_weights=rollout_weights,
        aggregation=aggregation,
        normalizer=normalizer,
    )
