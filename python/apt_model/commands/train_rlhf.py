"""The command `apt-model train-rlhf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.options import PromptOptions
from .arguments import check_at_least
from .groups import (
    PolicyModelOptions,
    PrecisionOptions,
    RewardOptions,
    SamplingOptions,
)
from .train_grpo import PolicyTrainingOptions, PromptRunOptions

if TYPE_CHECKING:
    from .job import Job


@dataclass(kw_only=True)
class RLHFOptions:
    """Loss."""

    ppo_epochs: int = field(
        default=4, metadata={"help": "passes over what was sampled", "recommended": (4, 8)}
    )
    minibatch_size: int = field(default=4, metadata={"help": "responses an optimizer step"})
    clip_epsilon: float = field(
        default=0.2,
        metadata={"help": "how far the ratio may move from 1", "recommended": (0.1, 0.3)},
    )
    value_loss_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    entropy_coef: float = field(default=0.01, metadata={"help": "weight of the entropy bonus"})
    kl_coef: float = field(
        default=0.1,
        metadata={"help": "weight of the KL penalty of each token", "recommended": (0.01, 0.2)},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "adapt --kl-coef to this divergence, in nats a token"}
    )
    reward_scale: float = field(default=1.0, metadata={"help": "factor of the rewards"})
    gamma: float = field(default=0.99, metadata={"help": "discount of a token"})
    gae_lambda: float = field(default=0.95, metadata={"help": "decay of the trace"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the responses"})

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "ppo_epochs", "minibatch_size")


@dataclass(kw_only=True)
class Options:
    """Train a causal language model on its own responses by proximal policy optimization (PPO).

    Its responses are compared with a reward, with a penalty on its divergence from where it began.
    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: PromptRunOptions
    model: PolicyModelOptions
    text: PromptOptions
    reward: RewardOptions
    sampling: SamplingOptions
    training: PolicyTrainingOptions
    loss: RLHFOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..rl import create_rlhf_trainer  # takes seconds, --help need not wait
    from ..training import processes
    from .models import reference_of
    from .policies import policy_job

    def make(model: Any, reward: Any, shared: Mapping[str, Any]) -> Any:
        loss, training = options.loss, options.training
        return create_rlhf_trainer(
            model,
            reward,
            ppo_epochs=loss.ppo_epochs,
            ref_policy_model=reference_of(options, None, needed=True),
            batch_size=-(-loss.minibatch_size // processes.count()),
            clip_epsilon=loss.clip_epsilon,
            value_loss_coef=loss.value_loss_coef,
            entropy_coef=loss.entropy_coef,
            kl_coef=loss.kl_coef,
            target_kl=loss.target_kl,
            reward_scale=loss.reward_scale,
            gamma=loss.gamma,
            gae_lambda=loss.gae_lambda,
            temperature=loss.temperature,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            **shared,
        )

    return policy_job(options, make, "train_step")
