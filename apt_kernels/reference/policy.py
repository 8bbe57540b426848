"""Losses of policies (PPO, GRPO and their family) and values, KL penalties and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import linear_token_logprobs
from .numerics import accumulate_dtype, aggregate, at_least_one, keep

LOG_RATIO_BOUND = 20.0  # e^20 = 4.9e8: beyond it a ratio says nothing and its exponential overflows
WHITEN_EPSILON = 1e-8


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

    w are the rollout weights. A term with a coefficient of 0 takes no part. With
    x = clamp(logps - old_logps, -20, 20), r = exp(x), A the advantage, sg(.) without gradient and
    t the SAPO temperature of the sign of A:

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

    Arguments as `apt_kernels.policy_loss`. The KL estimator "unbiased_k3" is r k3, which has the
    expectation and the gradient of the KL over tokens of the old policy (DeepSeek-AI 2025,
    DeepSeek-V3.2, section 3.1).

    Returns:
        `(loss, metrics)`. Metrics are 0-dim and detached. `policy_loss` is the aggregate of the
        surrogate alone. The others are means over the tokens that count: `approx_kl`
        (r - 1 - log r), `ppo_kl` (-log r), `clip_fraction`, `dual_clip_fraction`, `ref_kl` and
        `entropy`; 0 where no token counts.
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

    Arguments as `apt_kernels.kl_penalty`.
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

    Arguments as `apt_kernels.linear_policy_loss`. The metric `entropy` is always measured.
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


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the aggregate of max((v - R)^2, (v' - R)^2) / 2 and metrics.

    v' = clamp(v, old_values - clip_range, old_values + clip_range); without a `clip_range` it is
    (v - R)^2 / 2. Source: Schulman 2017 and the implementation of Dhariwal 2017.

    Arguments as `apt_kernels.value_loss`.

    Returns:
        `(loss, metrics)`: `clip_fraction`, and `explained_variance` = 1 - Var(R - v) / Var(R)
        over the tokens that count, 0 where their returns are all equal.
    """
    dtype = accumulate_dtype(values)
    mask = mask.bool()
    v, target = keep(mask, values.to(dtype)), keep(mask, returns.detach().to(dtype))
    losses = (v - target) ** 2
    clipped = torch.zeros_like(mask)
    if clip_range is not None:
        assert old_values is not None
        old = keep(mask, old_values.detach().to(dtype))
        bounded = torch.minimum(torch.maximum(v, old - clip_range), old + clip_range)
        bounded_losses = (bounded - target) ** 2
        clipped = bounded_losses > losses
        losses = torch.where(clipped, bounded_losses, losses)
    loss = aggregate(0.5 * losses, mask, aggregation, normalizer)
    tokens = at_least_one(mask.sum())
    spread = _sum_of_squares(target, mask, tokens)
    unexplained = _sum_of_squares(target - v.detach(), mask, tokens)
    explained = 1 - unexplained / torch.where(spread > 0, spread, torch.ones_like(spread))
    explained = torch.where((spread > 0) & _vary(target, mask), explained, 0.0)
    return loss, {
        "clip_fraction": (clipped & mask).sum().to(dtype) / tokens,
        "explained_variance": explained,
    }


def _vary(values: Tensor, mask: Tensor) -> Tensor:
    """Whether the values that count are not all equal: around a rounded mean these vary too."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    largest = values.masked_fill(~mask, -torch.inf).amax()
    return largest > values.masked_fill(~mask, torch.inf).amin()


def _sum_of_squares(values: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Sum of squared distances from the mean, over the tokens that count."""
    return (keep(mask, values - keep(mask, values).sum() / tokens) ** 2).sum()


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    time_major: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns A_t = delta_t + gamma * gae_lambda * A_(t+1) and the returns A + V.

    delta_t = r_t + gamma V_(t+1) - V_t. Source: Schulman 2016, "High-dimensional continuous
    control using generalized advantage estimation", eq. 16.

    Arguments as `apt_kernels.gae`. Steps that do not count are passed over: their trace is handed
    on, and their outputs are 0, whatever they hold.

    Returns:
        `(advantages, returns)` in the shape of `rewards`, without a gradient.
    """
    dtype = accumulate_dtype(rewards, values)

    def rows(x: Tensor) -> Tensor:  # one row a sequence, or one row of all sequences
        return x.unsqueeze(0) if cu_seqlens is not None else x.mT if time_major else x

    r, v = rows(rewards).to(dtype), rows(values).to(dtype)
    counts = torch.ones_like(v, dtype=torch.bool) if mask is None else rows(mask).bool()
    sequence = _sequence_of(v, cu_seqlens)
    following, last = _next_step_that_counts(counts, sequence)
    never = torch.zeros_like(counts)
    ends = never if terminated is None else rows(terminated).bool()
    breaks = never if truncated is None else rows(truncated).bool()
    if bootstrap is None:
        after = torch.zeros_like(v)
    elif bootstrap.shape == (len(v) if cu_seqlens is None else len(cu_seqlens) - 1,):
        after = keep(last, bootstrap.to(dtype)[sequence])
    else:
        after = rows(bootstrap).to(dtype)
    r, v = keep(counts, r), keep(counts, v)
    next_values = torch.where(last | breaks, after, v.gather(-1, following))
    deltas = keep(counts, r + gamma * keep(~ends, next_values) - v)
    # a step that does not count hands the trace on
    decays = torch.full_like(v, gamma * gae_lambda).masked_fill(~counts, 1.0)
    cut = counts & (ends | breaks | last)
    advantages = keep(counts, _backward_recurrence(deltas, decays, cut))
    returns = advantages + v
    if whiten:
        advantages = _whitened(advantages, counts)
    if cu_seqlens is not None:
        return advantages.squeeze(0), returns.squeeze(0)
    return (advantages.mT, returns.mT) if time_major else (advantages, returns)


def _sequence_of(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The number of the sequence that each step belongs to, and so its row of `bootstrap`."""
    if cu_seqlens is None:
        return torch.arange(v.shape[0], device=v.device).unsqueeze(-1).expand_as(v)
    steps = torch.arange(v.shape[1], device=v.device)
    return (torch.searchsorted(cu_seqlens.long(), steps, right=True) - 1).unsqueeze(0)


def _next_step_that_counts(counts: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the next step that counts (0 if none), and whether a sequence has none."""
    length = counts.shape[-1]
    steps = torch.arange(length, device=counts.device).expand_as(counts)
    from_here = torch.where(counts, steps, length).flip(-1).cummin(-1).values.flip(-1)
    following = torch.cat([from_here[:, 1:], torch.full_like(from_here[:, :1], length)], dim=-1)
    none = following == length
    following = following.masked_fill(none, 0)
    return following, none | (sequence.gather(-1, following) != sequence)


def _backward_recurrence(deltas: Tensor, decays: Tensor, cut: Tensor) -> Tensor:
    """Returns a with a_t = deltas_t + decays_t * a_(t+1), along the last dimension.

    Where it is cut a_t = deltas_t: behind it lies another episode, which may hold anything.
    """
    if not deltas.shape[-1]:
        return deltas
    carry = torch.zeros_like(deltas[:, 0])
    steps = []
    columns = (reversed(t.unbind(-1)) for t in (deltas, decays, cut))
    for delta, decay, ends in zip(*columns, strict=True):
        carry = torch.where(ends, delta, torch.addcmul(delta, decay, carry))
        steps.append(carry)
    return torch.stack(steps[::-1], dim=-1)


def _whitened(advantages: Tensor, counts: Tensor) -> Tensor:
    count = counts.sum()
    centred = keep(counts, advantages - advantages.sum() / count.clamp(min=1))
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return keep(counts, centred * torch.rsqrt(variance + WHITEN_EPSILON))


def group_advantages(
    rewards: Tensor, group_size: int, kind: str = "relative", *, eps: float = 1e-8
) -> Tensor:
    """Returns each reward relative to its group of G = `group_size` consecutive rows.

    | kind          | advantage                                             | source              |
    |---------------|-------------------------------------------------------|---------------------|
    | relative      | r - mean                                              | Liu 2025 (Dr. GRPO) |
    | normalized    | (r - mean) / (std + eps), unbiased std                | Shao 2024 (GRPO)    |
    | rank          | (rank - (G-1)/2) / (G/2), 0 the lowest, ties averaged |                     |
    | leave_one_out | r - mean of the others                                | Ahmadian 2024       |

    A group of one, and a group of equal rewards, give exactly 0.

    Arguments as `apt_kernels.group_advantages`.
    """
    r = rewards.detach().to(accumulate_dtype(rewards)).reshape(-1, group_size)
    if kind == "rank":
        others = r.unsqueeze(-2)
        below = (others < r.unsqueeze(-1)).sum(-1)
        equal = (others == r.unsqueeze(-1)).sum(-1) - 1
        rank = below.to(r.dtype) + 0.5 * equal
        return ((rank - (group_size - 1) / 2) / (group_size / 2)).reshape(-1)
    r = r - r[:, :1]  # equal rewards become exact zeros, whatever the rounding of their mean
    centred = r - r.mean(-1, keepdim=True)
    if kind == "normalized":
        variance = centred.square().sum(-1, keepdim=True) / max(group_size - 1, 1)
        centred = centred / (variance.sqrt() + eps)
    elif kind == "leave_one_out":
        centred = centred * (group_size / max(group_size - 1, 1))
    return centred.reshape(-1)
