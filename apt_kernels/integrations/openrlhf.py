"""OpenRLHF's losses under their own names. Nothing of OpenRLHF is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """`policy_loss` as OpenRLHF 0.11 calls it.

    A row without tokens is left out of the mean. Masked tokens may hold anything.

    Args:
        clip_eps_low: how far below 1 the ratio may fall.
        clip_eps_high: how far above 1 it may rise.
        dual_clip: the largest ratio that counts where the advantage is negative, or None.
        token_level_loss: the mean over tokens; else over rows of their mean.
        policy_loss_type: "ppo", or "gspo" with the mean over rows. In gspo a token has the gradient
            of its own advantage, OpenRLHF's in a row of equal advantages.
        is_correction_level: what is weighted by the ratio of the training engine to the one that
            sampled: "off", each "token", or "seq" (whole rows are kept or dropped).
        is_correction_mode: "mask" drops what lies outside the threshold and weights the rest by the
            ratio; "clip" bounds the ratio (with "token" and "ratio" alone).
        is_correction_gating: what is compared with the threshold: the "ratio", or the divergence
            "binary_kl" or "tv" of the two probabilities of the token.
        is_correction_threshold: `(low, high)`.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        checks.choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        checks.choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        checks.choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        checks.choice("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        ratio_of_tokens = is_correction_level != "seq" and is_correction_gating == "ratio"
        if is_correction_mode == "clip" and not ratio_of_tokens:
            raise ValueError(
                "is_correction_mode: expected 'mask' with the level 'seq' or a divergence, got "
                "'clip'"
            )
        low, high = map(float, is_correction_threshold)
        if is_correction_level != "off" and is_correction_gating != "ratio" and low > 0:
            raise ValueError(
                f"is_correction_threshold: expected 0 as the lower bound of a divergence, got {low}"
            )
        self.level, self.mode, self.gating = (
            is_correction_level,
            is_correction_mode,
            is_correction_gating,
        )
        self.low, self.high = low, high
        self.gspo = policy_loss_type == "gspo"
        self.token_level_loss = token_level_loss and not self.gspo
        self.options: dict[str, Any] = {
            "clip_low": clip_eps_low,
            "clip_high": clip_eps_high,
            "dual_clip": dual_clip,
            "ratio_level": "sequence" if self.gspo else "token",
            "aggregation": _aggregation(self.token_level_loss),
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss and its metrics.

        Args:
            log_probs: `(B, T)`, differentiable.
            old_log_probs: `(B, T)`, of the training engine at sampling time.
            advantages: `(B, T)`.
            action_mask: `(B, T)`, 1 = token that counts; None: all.
            rollout_log_probs: `(B, T)`, of the engine that sampled, which the correction needs.
                OpenRLHF's trainer gives them at the level "off" too, where nothing uses them.
            dp_size: processes that the gradient is averaged over.
            batch_num_tokens: tokens of all processes, by which a mean over tokens divides.
            global_batch_size: rows of all processes, by which a mean over rows divides.

        Returns:
            (loss, share of clipped tokens, mean of -log ratio, mean of
            rollout_log_probs - old_log_probs, share that the correction dropped or bounded); the
            last two None without a correction (and in gspo, where the rollout's log-probabilities
            replace the old ones).
        """
        mask = _mask(action_mask, log_probs)
        if self.level != "off" and rollout_log_probs is None:
            raise ValueError("rollout_log_probs: expected a tensor for the correction, got None")
        weights = drift = dropped = None
        old = old_log_probs
        if rollout_log_probs is not None and self.level != "off" and self.gspo:
            old = rollout_log_probs
        elif rollout_log_probs is not None and self.level != "off":
            weights, dropped = self._correction(old_log_probs, rollout_log_probs, mask)
            drift = _mean(rollout_log_probs - old_log_probs, mask)
        normalizer = _normalizer(
            self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        loss, metrics = policy_loss(
            log_probs,
            old,
            advantages,
            mask,
            rollout_weights=weights,
            normalizer=normalizer,
            **self.options,
        )
        kl = _mean(old_log_probs - log_probs, mask)  # the metric ppo_kl holds it within +-20
        return loss, metrics["clip_fraction"], kl, drift, dropped

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of the tokens' losses, and the share that was dropped or bounded."""
        live = mask.bool()
        log_ratio = torch.where(live, old - rollout, 0.0)
        ratio = log_ratio.exp()
        if self.gating == "ratio":
            gate = _row_mean(log_ratio, live).exp() if self.level == "seq" else ratio
        else:
            gate = torch.where(live, _divergence(self.gating, rollout, old), 0.0)
            gate = _row_mean(gate, live) if self.level == "seq" else gate
        outside = (gate < self.low) | (gate > self.high)
        if self.mode == "clip":
            weights = gate.clamp(self.low, self.high)
        else:
            weights = torch.where(outside, 0.0, ratio)
        share = outside.float().mean() if self.level == "seq" else _mean(outside.float(), mask)
        return weights, share


class ValueLoss(nn.Module):
    """`value_loss` as OpenRLHF 0.11 calls it; a row without tokens is left out of the mean.

    Args:
        clip_eps: how far the value may move, or None.
        token_level_loss: the mean over tokens; else over rows of their mean.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss
        self.options: dict[str, Any] = {
            "clip_range": clip_eps,
            "aggregation": _aggregation(token_level_loss),
        }

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Half of the mean squared error; the arguments are those of `PolicyLoss`."""
        old = None if self.options["clip_range"] is None else old_values
        mask = _mask(action_mask, values)
        normalizer = _normalizer(
            self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        options = {"old_values": old, "normalizer": normalizer, **self.options}
        return value_loss(values, returns, mask, **options)[0]


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

    def forward(  # type: ignore[override]  # the names that OpenRLHF uses
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


def _normalizer(
    tokens: bool, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None
) -> float | None:
    """Returns what the sum of this process is divided by; None: its own tokens or rows."""
    total = batch_num_tokens if tokens else global_batch_size
    return None if total is None else float(total) / dp_size


@torch.no_grad()
def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the tokens that count, 0 where there are none."""
    live = mask.bool()
    return torch.where(live, x, 0.0).sum() / live.sum().clamp(min=1)


def _row_mean(x: Tensor, live: Tensor) -> Tensor:
    """Returns `(B, 1)`, the mean of each row over its tokens that count."""
    return torch.where(live, x, 0.0).sum(-1, True) / live.sum(-1, True).clamp(min=1)


def _divergence(gating: str, rollout: Tensor, old: Tensor) -> Tensor:
    """Returns for each token a divergence of two coins that show the token with p and with q."""
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    if gating == "tv":
        return (p - q).abs()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
