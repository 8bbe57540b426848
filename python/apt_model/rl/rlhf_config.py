"""The options of the RLHF trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_kernels import PolicyLoss, ValueLoss, gae, kl_penalty

from ..training.config import check_count, check_flag, check_number
from .cut_responses import check_cut_responses


@dataclass
class RLHFConfig:
    """The options of `RLHFTrainer`; impossible values raise ValueError.

    Attributes:
        ppo_epochs: passes over what was sampled; recommended 4-8.
        clip_epsilon: how far the ratio may move from 1; recommended 0.1-0.3.
        value_loss_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the per-token KL penalty in the rewards; recommended 0.01-0.2.
        reward_scale: factor of the reward model's rewards.
        batch_size: rows of a PPO minibatch, one optimizer step each.
        max_length: of prompt and response together, in tokens.
        learning_rate: of the AdamW that is made without an optimizer; recommended 1e-6-1e-5.
        gamma: discount of a token, in [0, 1].
        gae_lambda: decay of the trace, in [0, 1].
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        target_kl: adapts `kl_coef` to this divergence, in nats a token; None: it stays.
        kl_estimator: of the penalty, as `apt_kernels.kl_penalty`.
        value_clip: how far values may move from those at sampling time; None: any far.
        dual_clip: as `apt_kernels.policy_loss`.
        whiten_advantages: bring them to mean 0 and variance 1 over the response tokens.
        temperature: of the distribution that is sampled and trained.
        max_new_tokens: of a response in `train_step`.
        weight_decay: of the AdamW that is made without an optimizer.
        cut_responses: of responses that did not end by themselves: "keep" learns from them as from
            others, "mask" learns nothing from them, "penalty" takes `cut_penalty` from their
            rewards, before `reward_scale`.
        cut_penalty: see `cut_responses`.
    """

    ppo_epochs: int = 4
    clip_epsilon: float = 0.2
    value_loss_coef: float = 0.1
    entropy_coef: float = 0.01
    kl_coef: float = 0.1
    reward_scale: float = 1.0
    batch_size: int = 4
    max_length: int = 512
    learning_rate: float = 1e-5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_grad_norm: float | None = 1.0
    target_kl: float | None = None
    kl_estimator: str = "k1"
    value_clip: float | None = 0.2
    dual_clip: float | None = None
    whiten_advantages: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 128
    weight_decay: float = 0.0
    cut_responses: str = "keep"
    cut_penalty: float = 1.0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError where an option cannot be, the kernels being asked for their own."""
        for name in ("ppo_epochs", "batch_size", "max_length", "max_new_tokens"):
            check_count(self, name)
        check_number(self, "clip_epsilon", above=0, below=1)
        for name in ("value_loss_coef", "entropy_coef", "kl_coef", "learning_rate", "weight_decay"):
            check_number(self, name, at_least=0)
        for name in ("reward_scale", "temperature"):
            check_number(self, name, above=0)
        for name in ("gamma", "gae_lambda"):
            check_number(self, name, at_least=0)
        for name in ("max_grad_norm", "target_kl", "value_clip", "dual_clip"):
            check_number(self, name, above=0, optional=True)
        check_flag(self, "whiten_advantages")
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("RLHFConfig.target_kl adapts kl_coef, which must not be 0 then")
        check_cut_responses(self)
        nothing = torch.zeros(0, 0)
        gae(nothing, nothing, gamma=self.gamma, gae_lambda=self.gae_lambda)
        kl_penalty(nothing, nothing, self.kl_estimator)
        PolicyLoss(clip_low=self.clip_epsilon, dual_clip=self.dual_clip)
        ValueLoss(self.value_clip)
