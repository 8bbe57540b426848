"""Groups of options of models, texts, numbers, samples and rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..scoring.options import CausalModelOptions, ModelOptions, PolicyModelOptions
from ..training.precision import PrecisionOptions
from .arguments import check_at_least
from .options import KEPT

__all__ = [
    "CausalModelOptions", "ModelOptions", "PolicyModelOptions", "PrecisionOptions",
    "RewardOptions", "SamplingOptions",
]  # fmt: skip


@dataclass(kw_only=True)
class RewardOptions:
    """Reward."""

    reward: tuple[str, ...] = field(
        default=(),
        metadata={
            **KEPT,  # the files are told by their contents
            "metavar": "FILE.py:NAME",
            "help": "function of a row of the data (a dictionary) and a response (a string) that "
            "returns a number, or None where it abstains; also package.module:NAME; several are "
            "added",
        },
    )
    reward_weight: tuple[float, ...] = field(
        default=(),
        metadata={"metavar": "NUMBER", "help": "weights of several rewards; without them 1 each"},
    )
    special_tokens: Literal["strip", "keep"] = field(
        default="strip",
        metadata={
            "help": "keep: rewards see special tokens in prompts and responses, but for padding "
            "and the token that ends a response"
        },
    )
    reward_model: Path | None = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "instead: the model folder that train-reward-model has made",
        },
    )

    def check(self) -> None:
        """Raises where there is none or more than one, or its folder is not there."""
        if (not self.reward) == (self.reward_model is None):
            raise ValueError("give one of --reward and --reward-model")
        rewards = len(self.reward) or 1
        if self.reward_weight and len(self.reward_weight) != rewards:
            raise ValueError(
                f"--reward-weight: expected one number for each of {rewards} rewards, got "
                f"{len(self.reward_weight)}"
            )
        if not all(map(math.isfinite, self.reward_weight)):
            raise ValueError(f"--reward-weight: expected finite numbers, got {self.reward_weight}")
        if self.reward_model is not None and not self.reward_model.is_dir():
            raise FileNotFoundError(f"{self.reward_model} is not a folder")


@dataclass(kw_only=True)
class SamplingOptions:
    """Sampling."""

    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a response"})
    stop: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "TEXT",
            "help": "texts or special tokens that end a response too; \\n is the end of a line",
        },
    )
    cut_responses: Literal["keep", "mask", "penalty"] = field(
        default="keep",
        metadata={
            "help": "responses that did not end by themselves: keep learns from them as from "
            "others, mask learns nothing from them, penalty lowers their rewards"
        },
    )
    cut_penalty: float = field(
        default=1.0, metadata={"help": "by how much --cut-responses penalty lowers a reward"}
    )
    eval_temperature: float = field(
        default=0.0,
        metadata={
            **KEPT,
            "help": "temperature of held-out responses; 0: always the likeliest token",
        },
    )

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "max_new_tokens")
        check_at_least(self, 0, "eval_temperature", "cut_penalty")
        if "" in self.stop:
            raise ValueError("--stop: expected texts, got an empty one")
