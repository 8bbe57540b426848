"""The losses of policy optimisation as modules: their options are given once."""

from __future__ import annotations

from torch import Tensor, nn

from .linear_policy_loss import linear_policy_loss
from .policy_loss import policy_loss
from .policy_options import PolicyOptions, check_options


class _PolicyModule(nn.Module):
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
        super().__init__()
        options = PolicyOptions(
            loss_type, clip_low, clip_high, dual_clip, ratio_level, sapo_temperature_pos,
            sapo_temperature_neg, kl_coef, kl_estimator, entropy_coef, aggregation,
        )  # fmt: skip
        check_options(options)
        self.options = {**options._asdict(), "backend": backend}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)


class PolicyLoss(_PolicyModule):
    """`policy_loss` as a module; its arguments are the options of the function."""

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logps: Tensor | None = None,
        entropy: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics)."""
        return policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            ref_logps=ref_logps,
            entropy=entropy,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **self.options,
        )


class LinearPolicyLoss(_PolicyModule):
    """`linear_policy_loss` as a module; its arguments are the options of `policy_loss`."""

    def forward(
        self,
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
        ref_logps: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics)."""
        return linear_policy_loss(
            hidden,
            weight,
            token_ids,
            old_logps,
            advantages,
            mask,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logps=ref_logps,
            rollout_weights=rollout_weights,
            normalizer=normalizer,
            **self.options,
        )
