"""The options of the GRPO trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apt_kernels import PolicyLoss

from ..training.config import check_count, check_flag, check_number
from .cut_responses import check_cut_responses

ADVANTAGES = ("relative", "normalized", "rank")


@dataclass
class GRPOConfig:
    """The options of `GRPOTrainer`; impossible values raise ValueError.

    Attributes:
        group_size: responses a prompt; recommended 4-8.
        advantage_type: "relative", "normalized" or "rank", as `apt_kernels.group_advantages`.
        temperature: divides the advantages.
        learning_rate: of the AdamW that is made without an optimizer; recommended 1e-6-1e-5.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        clip_range: how far the ratio may move from 1.
        kl_coef: weight of the divergence from the reference, where one is given.
        target_kl: adapts that weight to this divergence, in nats a token; None: it stays.
        value_loss_coef: weight of the critic's loss.
        use_critic: also train a value head to foretell the rewards.
        loss_type: as `apt_kernels.policy_loss`.
        clip_high: how far above 1 the ratio may rise; None: `clip_range`.
        dual_clip: as `apt_kernels.policy_loss`.
        ratio_level: "token", or "sequence" (GSPO).
        sapo_temperature_pos: as `apt_kernels.policy_loss`.
        sapo_temperature_neg: as `apt_kernels.policy_loss`.
        kl_estimator: as `apt_kernels.policy_loss`.
        entropy_coef: weight of the entropy bonus.
        aggregation: as `apt_kernels.policy_loss`; "sequence_mean" is GRPO's. "dr_grpo" divides by
            the rows times `max_new_tokens`, so that padding does not change it.
        sampling_temperature: of the responses; log-probabilities are of that distribution.
        max_new_tokens: of a response.
        max_length: of prompt and response, in tokens; None: unlimited.
        weight_decay: of the AdamW that is made without an optimizer.
        cut_responses: of responses that did not end by themselves: "keep" learns from them as from
            others, "mask" learns nothing from them (their rewards stay in their groups), "penalty"
            takes `cut_penalty` from their rewards.
        cut_penalty: see `cut_responses`.
    """

    group_size: int = 4
    advantage_type: str = "relative"
    temperature: float = 1.0
    learning_rate: float = 1e-5
    max_grad_norm: float | None = 1.0
    clip_range: float = 0.2
    kl_coef: float = 0.1
    target_kl: float | None = None
    value_loss_coef: float = 0.5
    use_critic: bool = False
    loss_type: str = "clip"
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_level: str = "token"
    sapo_temperature_pos: float | None = None
    sapo_temperature_neg: float | None = None
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    sampling_temperature: float = 1.0
    max_new_tokens: int = 128
    max_length: int | None = None
    weight_decay: float = 0.0
    cut_responses: str = "keep"
    cut_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError where an option cannot be, the kernels being asked for their own."""
        for name in ("group_size", "max_new_tokens"):
            check_count(self, name)
        check_count(self, "max_length", optional=True)
        if self.advantage_type not in ADVANTAGES:
            raise ValueError(
                f"GRPOConfig.advantage_type must be one of {ADVANTAGES}, "
                f"got {self.advantage_type!r}"
            )
        for name in ("temperature", "sampling_temperature"):
            check_number(self, name, above=0)
        for name in ("learning_rate", "kl_coef", "value_loss_coef", "entropy_coef", "weight_decay"):
            check_number(self, name, at_least=0)
        check_number(self, "clip_range", at_least=0, below=1)
        for name in ("max_grad_norm", "target_kl"):
            check_number(self, name, above=0, optional=True)
        check_number(self, "clip_high", at_least=0, optional=True)
        check_flag(self, "use_critic")
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("GRPOConfig.target_kl adapts kl_coef, which must not be 0 then")
        check_cut_responses(self)
        PolicyLoss(kl_coef=self.kl_coef, **self.surrogate())

    def surrogate(self) -> dict[str, Any]:
        """Returns the options of `apt_kernels.policy_loss`, but for the weight of the KL term."""
        clipped = self.loss_type in ("clip", "cispo")
        high = self.clip_range if self.clip_high is None else self.clip_high
        return {
            "loss_type": self.loss_type,
            **({"clip_low": self.clip_range, "clip_high": high} if clipped else {}),
            "dual_clip": self.dual_clip,
            "ratio_level": self.ratio_level,
            "sapo_temperature_pos": self.sapo_temperature_pos,
            "sapo_temperature_neg": self.sapo_temperature_neg,
            "kl_estimator": self.kl_estimator,
            "entropy_coef": self.entropy_coef,
            "aggregation": self.aggregation,
        }
