"""OpenRLHF's losses under their own names. Nothing of OpenRLHF is imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.logprobs.token_logprobs import token_logprobs
from ..ops.policy.policy_loss import policy_loss
from ..ops.policy.value_loss import value_loss
from ..ops.preference import dpo_loss as _dpo
from ..ops.preference.bradley_terry_loss import bradley_terry_loss


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`token_logprobs`; the logits stay as they are, where OpenRLHF divides them in place.

    Args:
        logits: `(..., V)`, differentiable.
        labels: `(...)` integers in [0, V).
        temperature: the logits are divided by it.

    Returns:
        `(...)` float32 (float64 for float64 logits).
    """
    return token_logprobs(logits, labels, temperature=temperature)


class PolicyLoss(nn.Module):
    """`policy_loss`; a row without tokens is left out of the mean, where OpenRLHF gives NaN.

    Args:
        clip_eps_low: how far below 1 the ratio may fall.
        clip_eps_high: how far above 1 it may rise.
        dual_clip: the largest ratio that counts where the advantage is negative, or None.
        token_level_loss: the mean over tokens; else over rows of their mean.
        policy_loss_type: "ppo", or "gspo" with the mean over rows. In gspo a token has the gradient
            of its own advantage, OpenRLHF's in a row of equal advantages.
        enable_vllm_is_correction: False; `policy_loss` takes such weights as `rollout_weights`.
        vllm_is_truncated_threshold: of that correction.
        vllm_is_correction_type: of that correction.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Sequence[float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        checks.choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        if enable_vllm_is_correction:
            raise ValueError(
                "enable_vllm_is_correction: expected False (policy_loss takes rollout_weights), "
                f"got {enable_vllm_is_correction!r}"
            )
        gspo = policy_loss_type == "gspo"
        self.options = {
            "clip_low": clip_eps_low,
            "clip_high": clip_eps_high,
            "dual_clip": dual_clip,
            "ratio_level": "sequence" if gspo else "token",
            "aggregation": _aggregation(token_level_loss and not gspo),
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """(loss, share of clipped tokens, mean of -log ratio, None: no correction)."""
        checks.unused("rollout_log_probs", rollout_log_probs, "there is no vLLM correction here")
        mask = _mask(action_mask, log_probs)
        loss, metrics = policy_loss(log_probs, old_log_probs, advantages, mask, **self.options)
        return loss, metrics["clip_fraction"], metrics["ppo_kl"], None


class ValueLoss(nn.Module):
    """`value_loss`; a row without tokens is left out of the mean, where OpenRLHF gives NaN.

    Args:
        clip_eps: how far the value may move, or None.
        token_level_loss: the mean over tokens; else over rows of their mean.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.options = {"clip_range": clip_eps, "aggregation": _aggregation(token_level_loss)}

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """Half of the mean squared error."""
        old = None if self.options["clip_range"] is None else old_values
        mask = _mask(action_mask, values)
        return value_loss(values, returns, mask, old_values=old, **self.options)[0]


class PairWiseLoss(nn.Module):
    """`bradley_terry_loss`."""

    def forward(
        self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None
    ) -> Tensor:
        """The mean over pairs; margin: one a pair, of integers too."""
        if isinstance(margin, Tensor) and not margin.is_floating_point():
            margin = margin.to(chosen_reward.dtype)
        return bradley_terry_loss(chosen_reward, reject_reward, margin=margin)


class DPOLoss(_dpo.DPOLoss):
    """`dpo_loss`, sigmoid or ipo; smoothing with ipo is an error, OpenRLHF ignores it."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__(beta, label_smoothing, "ipo" if ipo else "sigmoid")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, chosen_rewards, rejected_rewards)."""
        refs = (reference_chosen_logps, reference_rejected_logps)
        return super().forward(policy_chosen_logps, policy_rejected_logps, *refs)


def _aggregation(token_level_loss: bool) -> str:
    return "token_mean" if token_level_loss else "sequence_mean"


def _mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if action_mask is None else action_mask
