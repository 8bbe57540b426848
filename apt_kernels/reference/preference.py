"""Losses of preference pairs: DPO and its family, Bradley-Terry."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .head import linear_token_logprobs, sequence_logps
from .numerics import accumulate_dtype, log1mexp, reduce_loss


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reference_free: bool = False,
    reduction: str = "mean",
    discopop_tau: float | None = None,
    simpo_gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the preference loss of `loss_type` and both implicit rewards, detached.

    With c, r the log-ratios policy - reference of the chosen and the rejected answer (reference 0
    where there is none), d = c - r, s = label_smoothing, b = beta, S the sigmoid, L its logarithm,
    |.| an answer's length and z_c, z_r = max(0, batch mean of c, r) without gradient:

    | loss_type    | loss of a pair                                         | source             |
    |--------------|--------------------------------------------------------|--------------------|
    | sigmoid      | -(1-s) L(bd) - s L(-bd)                                | Rafailov 2023      |
    | robust       | (-(1-s) L(bd) + s L(-bd)) / (1-2s)                     | Chowdhury 2024     |
    | hinge        | max(0, 1 - bd)                                         | Zhao 2023          |
    | ipo          | (d - 1/(2b))^2; given lengths, d = c/abs(c) - r/abs(r) | Azar 2023          |
    | exo_pair     | S(bd) (L(bd) - log(1-s)) + S(-bd) (L(-bd) - log s)     | Ji 2024            |
    | nca_pair     | -L(bc) - L(-bc)/2 - L(-br)/2                           | Chen 2024          |
    | bco_pair     | -L(bc) - L(-br)                                        | Jung 2024          |
    | sppo_hard    | (c - 1/(2b))^2 + (r + 1/(2b))^2                        | Wu 2024            |
    | apo_zero     | 1 - S(bc) + S(br)                                      | D'Oosterlinck 2024 |
    | apo_down     | S(bc) + 1 - S(bd)                                      | D'Oosterlinck 2024 |
    | discopop     | -L(l) (1 - S(l/tau)) + exp(-l) S(l/tau), l = bd        | Lu 2024            |
    | kto_pair     | (1 - S(b (c - z_r)) + 1 - S(b (z_c - r))) / 2          | Ethayarajh 2024    |
    | aot          | sigmoid, d = sort(pc - pr) - sort(rc - rr)             | Melnyk 2024        |
    | aot_unpaired | sigmoid, d = sort(c) - sort(r)                         | Melnyk 2024        |
    | sigmoid_norm | sigmoid, d = c/abs(c) - r/abs(r)                       | Meng 2024          |
    | simpo        | sigmoid of bd - gamma, reference 0, averaged logps     | Meng 2024          |
    | orpo         | -b L(log-odds of pc - log-odds of pr), averaged logps  | Hong 2024          |

    Args:
        policy_chosen_logps: `(B,)`, differentiable.
        policy_rejected_logps: `(B,)`, differentiable.
        ref_chosen_logps: `(B,)` or None.
        ref_rejected_logps: `(B,)` or None.
        beta: the strength of the reference.
        label_smoothing: s, the probability that a label is wrong.
        loss_type: a row of the table.
        reference_free: take the reference as 0.
        reduction: "mean", "sum" or "none" (sorted pairs, for aot and aot_unpaired).
        discopop_tau: 0.05 unless given.
        simpo_gamma: 0.5 unless given.
        chosen_lengths: `(B,)`, tokens of the chosen answers (at least 1), for ipo and sigmoid_norm.
        rejected_lengths: `(B,)`, tokens of the rejected answers.

    Returns:
        `(loss, chosen_rewards, rejected_rewards)`; the rewards are b*c and b*r, `(B,)`, of the
        summed log-ratios whatever the type. No pairs: the loss is 0.
    """
    dtype = accumulate_dtype(policy_chosen_logps)
    pc, pr = policy_chosen_logps.to(dtype), policy_rejected_logps.to(dtype)
    rc, rr = torch.zeros_like(pc), torch.zeros_like(pr)
    if ref_chosen_logps is not None and not reference_free:
        assert ref_rejected_logps is not None
        rc, rr = ref_chosen_logps.to(dtype), ref_rejected_logps.to(dtype)
    c, r = pc - rc, pr - rr
    chosen_rewards, rejected_rewards = (beta * c).detach(), (beta * r).detach()
    if loss_type == "orpo":
        log_odds = (pc - pr) - (log1mexp(pc) - log1mexp(pr))
        losses = -beta * F.logsigmoid(log_odds)
    elif loss_type in _LOSSES_OF_EACH:
        losses = _LOSSES_OF_EACH[loss_type](c, r, beta)
    else:
        if loss_type == "aot":
            d = torch.sort(pc - pr).values - torch.sort(rc - rr).values
        elif loss_type == "aot_unpaired":
            d = torch.sort(c).values - torch.sort(r).values
        elif chosen_lengths is not None:
            assert rejected_lengths is not None
            d = c / chosen_lengths.clamp(min=1) - r / rejected_lengths.clamp(min=1)
        else:
            d = c - r
        losses = _loss_of_difference(loss_type, d, beta, label_smoothing, discopop_tau, simpo_gamma)
    return reduce_loss(losses, reduction), chosen_rewards, rejected_rewards


def _kto_pair(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """Mean of both answers' KTO losses, each against the mean log-ratio of the other's batch."""
    count = max(c.numel(), 1)
    kl_chosen = (c.detach().sum() / count).clamp(min=0)
    kl_rejected = (r.detach().sum() / count).clamp(min=0)
    losses = torch.sigmoid(-beta * (c - kl_rejected)) + torch.sigmoid(beta * (r - kl_chosen))
    return 0.5 * losses


_LOSSES_OF_EACH = {  # those that look at c and r, not only at their difference
    "nca_pair": lambda c, r, beta: (
        -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)
    ),
    "bco_pair": lambda c, r, beta: -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r),
    "sppo_hard": lambda c, r, beta: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
    "apo_zero": lambda c, r, beta: torch.sigmoid(-beta * c) + torch.sigmoid(beta * r),
    "apo_down": lambda c, r, beta: torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r)),
    "kto_pair": _kto_pair,
}


def _loss_of_difference(
    loss_type: str,
    d: Tensor,
    beta: float,
    label_smoothing: float,
    discopop_tau: float | None,
    simpo_gamma: float | None,
) -> Tensor:
    if loss_type == "hinge":
        return torch.relu(1 - beta * d)
    if loss_type == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    logits = beta * d
    if loss_type == "discopop":
        t = 0.05 if discopop_tau is None else discopop_tau
        # exp(-l) S(l/t) as one exponential: inf * 0 for very negative l otherwise
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        exponential = torch.exp(F.logsigmoid(logits / t) - finite)
        rest = torch.where(torch.sigmoid(logits / t) == 0, 1.0, torch.sigmoid(-logits / t))
        return -F.logsigmoid(logits) * rest + exponential
    if loss_type == "simpo":
        logits = logits - (0.5 if simpo_gamma is None else simpo_gamma)
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    if loss_type == "exo_pair":
        log_smoothing = math.log(label_smoothing) if label_smoothing else -math.inf
        return _product(torch.sigmoid(logits), right - math.log1p(-label_smoothing)) + _product(
            torch.sigmoid(-logits), wrong - log_smoothing
        )
    if not label_smoothing:
        return -right
    if loss_type == "robust":
        loss = -(1 - label_smoothing) * right + label_smoothing * wrong
        return loss / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _product(p: Tensor, q: Tensor) -> Tensor:
    """p q, and 0 where p is: q may be infinite there."""
    return p * q.masked_fill(p == 0, 0)


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns -log sigmoid(c - r - margin) + center_coef * (c + r)^2 of each pair, reduced.

    Source: Bradley & Terry 1952; Ouyang 2022 (reward models); Touvron 2023 (margins); Eisenstein
    2023 (centring).

    Args:
        chosen_rewards: `(B,)`, differentiable.
        rejected_rewards: `(B,)`, differentiable.
        margin: a number, or one per pair `(B,)`.
        center_coef: weight of the term that keeps the rewards of a pair centred at 0.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, 0-dim or `(B,)`; 0 for no pairs.
    """
    dtype = accumulate_dtype(chosen_rewards)
    c, r = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    difference = c - r
    if margin is not None:
        difference = difference - (margin.to(dtype) if isinstance(margin, Tensor) else margin)
    losses = -F.logsigmoid(difference)
    if center_coef:
        losses = losses + center_coef * (c + r) ** 2
    return reduce_loss(losses, reduction)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    average: bool = False,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reference_free: bool = False,
    reduction: str = "mean",
    discopop_tau: float | None = None,
    simpo_gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `dpo_loss` of hidden states: the B chosen answers first, then the B rejected.

    Args:
        hidden: `(2B, T, D)`, differentiable.
        weight: `(V, D)`, differentiable.
        token_ids: `(2B, T)`.
        mask: `(2B, T)`, True counts: the tokens of the answers.
        ref_chosen_logps: `(B,)` or None, as in `dpo_loss`.
        ref_rejected_logps: `(B,)` or None.
        bias: `(V,)` or None, differentiable.
        temperature: as in `linear_token_logprobs`; also `softcap` and `logit_scale`.
        softcap: the bound of the tanh cap, or None.
        logit_scale: a factor of the logits.
        average: divide each answer's log-probability by its tokens (as SimPO and ORPO want).
        beta: as in `dpo_loss`; also all that follows.
        label_smoothing: see `dpo_loss`.
        loss_type: see `dpo_loss`.
        reference_free: see `dpo_loss`.
        reduction: see `dpo_loss`.
        discopop_tau: see `dpo_loss`.
        simpo_gamma: see `dpo_loss`.
        chosen_lengths: see `dpo_loss`.
        rejected_lengths: see `dpo_loss`.

    Returns:
        `(loss, chosen_rewards, rejected_rewards)`.
    """
    logps = linear_token_logprobs(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
    )
    chosen, rejected = sequence_logps(logps, mask, average=average).chunk(2)
    return dpo_loss(
        chosen,
        rejected,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        reference_free=reference_free,
        reduction=reduction,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
