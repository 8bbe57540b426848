"""Groups of options of models, texts, numbers, samples and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .arguments import check_at_least
from .options import KEPT


@dataclass(kw_only=True)
class ModelOptions:
    """Model."""

    model: Path = field(metadata={"metavar": "FOLDER", "help": "Hugging Face model folder"})
    gguf_file: str | None = field(
        default=None, metadata={"metavar": "NAME", "help": "GGUF file inside the model's folder"}
    )
    train_last_layers: int | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "help": "freeze all but the last N layers; without it everything is trained",
        },
    )

    def check(self) -> None:
        """Raises for a folder that is not there."""
        if self.model is not None and not self.model.is_dir():
            raise FileNotFoundError(f"{self.model} is not a folder")


@dataclass(kw_only=True)
class PrecisionOptions:
    """Precision."""

    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type of the parameters"}
    )
    autocast: Literal["none", "bf16", "fp16"] = field(
        default="none", metadata={"help": "type of the computation"}
    )


@dataclass(kw_only=True)
class TextOptions:
    """Text."""

    max_length: int = field(
        default=512, metadata={"help": "tokens of prompt and answer; cut beyond"}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "tokens of a prompt; without it half of --max-length"}
    )
    chat_template: bool = field(
        default=False, metadata={"help": "put the prompt into the chat template"}
    )

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "max_length", "max_prompt_length")


@dataclass(kw_only=True)
class PromptOptions(TextOptions):
    """Text."""

    max_length: int = field(
        default=512, metadata={"help": "tokens of prompt and response; sampling ends there"}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "rows with longer prompts cannot be used; without it one less than --max-length"
        },
    )


@dataclass(kw_only=True)
class RewardOptions:
    """Reward."""

    reward: str | None = field(
        default=None,
        metadata={
            **KEPT,  # the file is told by its content
            "metavar": "FILE.py:NAME",
            "help": "function of a row of the data (a dictionary) and a response (a string) that "
            "returns a number; also package.module:NAME",
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
        if (self.reward is None) == (self.reward_model is None):
            raise ValueError("give one of --reward and --reward-model")
        if self.reward_model is not None and not self.reward_model.is_dir():
            raise FileNotFoundError(f"{self.reward_model} is not a folder")


@dataclass(kw_only=True)
class SamplingOptions:
    """Sampling."""

    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a response"})
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
        check_at_least(self, 0, "eval_temperature")
