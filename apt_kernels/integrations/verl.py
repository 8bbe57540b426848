"""verl's functions under their own names. Nothing of verl is imported.

In verl's registries: `register_policy_loss("apt")(compute_policy_loss_vanilla)`,
`register_adv_est("apt_gae")(compute_gae_advantage_return)`,
`register_adv_est("apt_grpo")(compute_grpo_outcome_advantage)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..ops.logprobs.token_logprobs import token_logprobs
from ..ops.policy.gae import gae
from ..ops.policy.kl_penalty import kl_penalty as _ops_kl_penalty
from ..ops.policy.policy_loss import policy_loss
from ..ops.policy.value_loss import value_loss

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "dr_grpo",
}
ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "k1",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`token_logprobs` as `verl.utils.torch_functional` names it.

    Args:
        logits: `(..., V)`, differentiable.
        labels: `(...)` integers in [0, V).
        inplace_backward: verl's permission to write the gradient over the logits. It is not used:
            the logits stay as they are, and the gradient is a tensor of its own.

    Returns:
        `(...)` float32 (float64 for float64 logits).
    """
    return token_logprobs(logits, labels)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """`linear_token_logprobs` with its entropy, as `verl.utils.kernel` names it.

    Args:
        hidden: `(..., D)`, differentiable; `N` rows in all.
        weight: `(V, D)`, differentiable.
        labels: `(...)` integers in [0, V).
        temperature: the logits are divided by it.
        reduction: of the log-probabilities: "none" `(N,)`, "sum" or "mean" (0 for no rows).
        dist_process_group: None. A head split over processes is refused.

    Returns:
        `(logprobs, entropy)`, both differentiable; the entropy `(N,)` whatever the reduction.
    """
    checks.choice("reduction", reduction, ("none", "sum", "mean"))
    checks.unused("dist_process_group", dist_process_group, "the vocabulary must be whole here")
    checks.tensor("hidden", hidden)
    checks.tensor("labels", labels, checks.INTEGERS)
    logps, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
    )
    if reduction != "none":
        logps = logps.sum() if reduction == "sum" else logps.sum() / max(logps.numel(), 1)
    return logps, entropy


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """`gae` over the tokens that count, the advantages whitened over them.

    Args:
        token_level_rewards: `(B, T)`.
        values: `(B, T)`, before each token.
        response_mask: `(B, T)`, 1 = token that counts; others are skipped, such as a tool's answer.
        gamma: discount of a token.
        lam: decay of the trace.

    Returns:
        `(advantages, returns)`, `(B, T)` each, 0 where the mask is 0 (verl's hold numbers there
        that nothing uses).
    """
    return gae(
        token_level_rewards,
        values,
        gamma=float(gamma),
        gae_lambda=float(lam),
        mask=response_mask,
        whiten=True,
    )


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`policy_loss` of PPO with the dual clip, as verl 0.9 calls it.

    Args:
        old_log_prob: `(B, T)`, at sampling time.
        log_prob: `(B, T)`, differentiable.
        advantages: `(B, T)`.
        response_mask: `(B, T)`, 1 = token that counts.
        loss_agg_mode: how tokens are summed, one of `AGGREGATIONS`.
        config: attributes or keys `clip_ratio`, `clip_ratio_low`, `clip_ratio_high` (None:
            `clip_ratio`), `clip_ratio_c`, and `global_batch_info` with the counts of all processes
            that `agg_loss` takes; None: 0.2, 0.2 and 3.
        rollout_is_weights: `(B, T)`, factors of the tokens' losses.

    Returns:
        `(loss, {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"})`.
    """
    checks.choice("loss_agg_mode", loss_agg_mode, tuple(AGGREGATIONS))
    clip = _get(config, "clip_ratio", 0.2)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_low=_get(config, "clip_ratio_low", clip),
        clip_high=_get(config, "clip_ratio_high", clip),
        dual_clip=_get(config, "clip_ratio_c", 3.0),
        aggregation=AGGREGATIONS[loss_agg_mode],
        rollout_weights=rollout_is_weights,
        normalizer=_normalizer(
            response_mask, loss_agg_mode, **_get(config, "global_batch_info", {})
        ),
    )
    names = {"pg_clipfrac": "clip_fraction", "ppo_kl": "ppo_kl"}
    names["pg_clipfrac_lower"] = "dual_clip_fraction"
    return loss, {f"actor/{theirs}": metrics[ours].item() for theirs, ours in names.items()}


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`value_loss`, as verl 0.9 calls it.

    Args:
        vpreds: `(B, T)`, differentiable.
        returns: `(B, T)`.
        values: `(B, T)`, at sampling time.
        response_mask: `(B, T)`, 1 = token that counts.
        cliprange_value: how far a value may move, above 0.
        loss_agg_mode: as the rest, an argument of `agg_loss`.
        dp_size: of `agg_loss`.
        batch_num_tokens: of `agg_loss`.
        global_batch_size: of `agg_loss`.
        loss_scale_factor: of `agg_loss`.

    Returns:
        `(loss, share of clipped tokens)`, 0-dim; the first differentiable.
    """
    checks.choice("loss_agg_mode", loss_agg_mode, tuple(AGGREGATIONS))
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss, metrics = value_loss(
        vpreds,
        returns,
        response_mask,
        old_values=values,
        clip_range=cliprange_value,
        aggregation=AGGREGATIONS[loss_agg_mode],
        normalizer=_normalizer(response_mask, loss_agg_mode, *counts),
    )
    return loss, metrics["clip_fraction"]


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """`apt_kernels.kl_penalty` under verl's names of the estimators.

    Args:
        logprob: any shape, differentiable.
        ref_logprob: the same shape; no gradient.
        kl_penalty: "kl" or "k1", "abs" (its absolute value), "mse" or "k2", "low_var_kl" or "k3"
            (bounded by 10). With a "+" behind it the value has the gradient of k2.

    Returns:
        The shape of logprob, float32 (float64 for float64).
    """
    straight_through = kl_penalty.endswith("+")
    name = kl_penalty.removesuffix("+")
    checks.choice("kl_penalty", name, tuple(ESTIMATORS))
    estimate = _kl(logprob, ref_logprob, ESTIMATORS[name])
    if name == "abs":
        estimate = estimate.abs()
    elif ESTIMATORS[name] == "k3":
        estimate = estimate.clamp(max=10.0)
    if straight_through:
        square = _kl(logprob, ref_logprob, "k2")
        estimate = square - square.detach() + estimate.detach()
    return estimate


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """The aggregate of the losses of tokens, in plain PyTorch; masked tokens may hold anything.

    Args:
        loss_mat: `(B, T)`, differentiable.
        loss_mask: `(B, T)`, 1 = token that counts.
        loss_agg_mode: how tokens are summed, one of `AGGREGATIONS`.
        dp_size: processes that the gradient is averaged over.
        batch_num_tokens: tokens of all processes; None: the tokens of this one.
        global_batch_size: rows of all processes; None: the rows of this one that have tokens.
        loss_scale_factor: what "seq-mean-token-sum-norm" divides by besides; None: T.

    Returns:
        0-dim, 0 where nothing counts.

    Raises:
        ValueError: an unknown mode; several processes without their counts.
    """
    checks.choice("loss_agg_mode", loss_agg_mode, tuple(AGGREGATIONS))
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    normalizer = _normalizer(loss_mask, loss_agg_mode, *counts)
    live = loss_mask.bool()
    losses = torch.where(live, loss_mat, 0.0)
    if loss_agg_mode == "seq-mean-token-mean":
        losses = losses.sum(-1) / live.sum(-1).clamp(min=1)
    if normalizer is None:
        rows = live.any(-1).sum()
        divisors: dict[str, float | Tensor] = {"token-mean": live.sum(), "token-sum": 1}
        normalizer = divisors.get(loss_agg_mode, rows)
        if loss_agg_mode == "seq-mean-token-sum-norm":
            normalizer = rows * loss_mask.shape[-1]
        normalizer = torch.as_tensor(normalizer).clamp(min=1)
    return losses.sum() / normalizer


@torch.no_grad()
def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """GRPO's advantages of rows whose group is named, in any order and of any size.

    Args:
        token_level_rewards: `(B, T)`; their sum is the reward of the row.
        response_mask: `(B, T)`, 1 = token that counts.
        index: `(B,)` names of the rows' groups: an array, a tensor or a sequence.
        epsilon: added to the standard deviation.
        norm_adv_by_std_in_grpo: divide by the standard deviation (Shao 2024), or not (Liu 2025).
        config: not used.

    Returns:
        `(advantages, advantages)`, `(B, T)`, 0 where the mask is 0. A row that is alone in its
        group keeps its reward, as in verl.
    """
    scores = token_level_rewards.sum(-1)
    group, counts = _groups(index, scores)
    mean = _of_groups(scores, group, counts) / counts
    centered = torch.where(counts > 1, scores - mean, scores)
    if norm_adv_by_std_in_grpo:
        squares = _of_groups(centered.square(), group, counts)
        deviation = (squares / (counts - 1).clamp(min=1)).sqrt()
        centered = centered / (torch.where(counts > 1, deviation, 1.0) + epsilon)
    advantages = centered.to(scores.dtype).unsqueeze(-1) * response_mask
    return advantages, advantages


@torch.no_grad()
def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The reward of a row less the mean of the others of its group (Ahmadian 2024).

    Args:
        token_level_rewards: `(B, T)`; their sum is the reward of the row.
        response_mask: `(B, T)`, 1 = token that counts.
        index: `(B,)` names of the rows' groups, as in `compute_grpo_outcome_advantage`.
        epsilon: not used.
        config: not used.
        **kwargs: not used; verl gives every estimator what some need.

    Returns:
        `(advantages, advantages)`, `(B, T)`, 0 where the mask is 0. A row that is alone in its
        group keeps its reward, as in verl.
    """
    scores = token_level_rewards.sum(-1)
    group, counts = _groups(index, scores)
    mean = _of_groups(scores, group, counts) / counts
    others = (scores - mean) * counts / (counts - 1).clamp(min=1)
    advantages = torch.where(counts > 1, others, scores)
    advantages = advantages.to(scores.dtype).unsqueeze(-1) * response_mask
    return advantages, advantages


def _get(config: Any, name: str, default: Any) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _kl(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    return _ops_kl_penalty(logprob, ref_logprob.detach(), estimator)


def _normalizer(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> float | Tensor | None:
    """Returns what a process divides by so that the mean over processes is the mean of all tokens.

    None where the default of the aggregation is right: its own tokens or rows.
    """
    if loss_agg_mode == "token-sum":
        return None if dp_size == 1 else 1.0 / dp_size
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if count is None and dp_size > 1:
        raise ValueError(f"{name}: expected the count of all {dp_size} processes, got None")
    if loss_agg_mode == "seq-mean-token-sum-norm":
        if count is None and loss_scale_factor is None:
            return None
        rows = mask.bool().any(-1).sum().clamp(min=1) if count is None else float(count)
        return rows * (loss_scale_factor or mask.shape[-1]) / dp_size
    return None if count is None else float(count) / dp_size


def _groups(index: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `(B,)` the number of each row's group, and `(B,)` how many rows the group has."""
    names = index.tolist() if hasattr(index, "tolist") else list(index)
    if len(names) != len(scores):
        raise ValueError(f"index: expected {len(scores)} names, one a row, got {len(names)}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group = torch.tensor([numbers[name] for name in names], device=scores.device)
    return group, torch.bincount(group)[group]


def _of_groups(x: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Returns for each row the sum of x over its group, in float64."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    return total.index_add_(0, group, x.double())[group]
