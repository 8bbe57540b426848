"""The command `apt-model train-grpo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.options import PromptOptions
from .arguments import check_at_least
from .groups import (
    PolicyModelOptions,
    PrecisionOptions,
    RewardOptions,
    SamplingOptions,
)
from .options import FILES, RunOptions, TrainingOptions, default_of

if TYPE_CHECKING:
    from .job import Job

PROMPTS = (
    "rows with prompt, a string or a list of messages: JSON lines, JSON, CSV, Parquet, or a folder "
    "of datasets; also several; other columns are for the reward function"
)


@dataclass(kw_only=True)
class PromptRunOptions(RunOptions):
    """Run."""

    data: tuple[Path, ...] = field(metadata={**FILES, "metavar": "FILE", "help": PROMPTS})


@dataclass(kw_only=True)
class PolicyTrainingOptions(TrainingOptions):
    """Training."""

    learning_rate: float = default_of(
        TrainingOptions, "learning_rate", 1e-5, recommended=(1e-6, 1e-5)
    )


@dataclass(kw_only=True)
class GRPOOptions:
    """Loss."""

    group_size: int = field(
        default=4, metadata={"help": "responses a prompt", "recommended": (4, 8)}
    )
    advantage_type: Literal["relative", "normalized", "rank"] = field(
        default="relative", metadata={"help": "relative first"}
    )
    clip_range: float = field(default=0.2, metadata={"help": "how far the ratio may move from 1"})
    aggregation: Literal["token_mean", "token_sum", "sequence_mean", "sequence_sum", "dr_grpo"] = (
        field(default="sequence_mean", metadata={"help": "how the losses of tokens are averaged"})
    )
    ratio_level: Literal["token", "sequence"] = field(
        default="token", metadata={"help": "sequence: GSPO"}
    )
    use_critic: bool = field(default=False, metadata={"help": "also train a value head"})
    kl_coef: float = field(
        default=0.1,
        metadata={"help": "weight of the divergence from a frozen copy; 0: no copy is made"},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "adapt --kl-coef to this divergence, in nats a token"}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "temperature of the responses"}
    )

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "group_size")


@dataclass(kw_only=True)
class Options:
    """Train a causal language model on groups of its own responses by GRPO.

    Group relative policy optimization compares each response with the others to its prompt.
    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: PromptRunOptions
    model: PolicyModelOptions
    text: PromptOptions
    reward: RewardOptions
    sampling: SamplingOptions
    training: PolicyTrainingOptions
    loss: GRPOOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..rl import create_grpo_trainer  # takes seconds, --help need not wait
    from .models import reference_of
    from .policies import policy_job

    def make(model: Any, reward: Any, shared: Mapping[str, Any]) -> Any:
        loss, training = options.loss, options.training
        compared = loss.kl_coef > 0
        return create_grpo_trainer(
            model,
            reward,
            group_size=loss.group_size,
            advantage_type=loss.advantage_type,
            clip_range=loss.clip_range,
            aggregation=loss.aggregation,
            ratio_level=loss.ratio_level,
            use_critic=loss.use_critic,
            kl_coef=loss.kl_coef,
            target_kl=loss.target_kl,
            sampling_temperature=loss.sampling_temperature,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            ref_policy_model=reference_of(options, None, compared)
            or ("copy" if compared else None),
            **shared,
        )

    return policy_job(options, make, "train_step_from_prompts")
