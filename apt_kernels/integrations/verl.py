"""verl's functions under their own names. Nothing of verl is imported.

In verl's registries: `register_policy_loss("apt")(compute_policy_loss_vanilla)`,
`register_adv_est("apt_gae")(compute_gae_advantage_return)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..ops.logprobs.token_logprobs import token_logprobs
from ..ops.policy.gae import gae
from ..ops.policy.policy_loss import policy_loss

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "dr_grpo",
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
            `clip_ratio`), `clip_ratio_c`, and `global_batch_info`: the tokens or rows of all
            processes, by which the mean then divides; None: 0.2, 0.2 and 3.
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
        normalizer=_normalizer(loss_agg_mode, _get(config, "global_batch_info", {})),
    )
    names = {"pg_clipfrac": "clip_fraction", "ppo_kl": "ppo_kl"}
    names["pg_clipfrac_lower"] = "dual_clip_fraction"
    return loss, {f"actor/{theirs}": metrics[ours].item() for theirs, ours in names.items()}


def _get(config: Any, name: str, default: Any) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _normalizer(loss_agg_mode: str, batch: Mapping[str, Any]) -> float | None:
    """What a process divides by so that the mean over processes is that of all tokens or rows."""
    checks.unused(
        "loss_scale_factor", batch.get("loss_scale_factor"), "give policy_loss a normalizer"
    )
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = batch.get(name)
    if count is None or loss_agg_mode == "token-sum":
        return None
    if loss_agg_mode == "seq-mean-token-sum-norm":
        raise ValueError(f"{name}: expected None in {loss_agg_mode}, got {count!r}")
    return float(count) / batch.get("dp_size", 1)
