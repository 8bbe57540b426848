"""Options of a command: which model it trains, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class ModelOptions:
    """Model."""

    model: Path = field(
        metadata={
            "metavar": "FOLDER",
            "help": "Hugging Face model folder, or the folder of a PEFT adapter, which trains on",
        }
    )
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
    lora_rank: int | None = field(
        default=None,
        metadata={
            "metavar": "R",
            "help": "train an adapter of this rank (LoRA) instead of the model; recommended 8-64",
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={
            "metavar": "A",
            "help": "the adapter's output is scaled by A / R; without it A is twice the rank",
        },
    )
    lora_targets: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "names of the linear layers that are adapted; without it all but the head",
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "save the model with its adapter merged, not the adapter alone"},
    )

    def check(self) -> None:
        """Raises for a folder that is not there, and for what cannot be, alone or together."""
        if self.model is not None and not self.model.is_dir():
            raise FileNotFoundError(f"{self.model} is not a folder")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora-rank must be at least 1, got {self.lora_rank}")
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) is not None and self.lora_rank is None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} belongs to an adapter that is made: give --lora-rank too")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora-alpha must be above 0, got {self.lora_alpha}")
        if self.has_adapter and self.train_last_layers is not None:
            raise ValueError(
                "--train-last-layers and an adapter: expected one of them, as an adapter is all "
                "that is trained"
            )
        if self.has_folder_of_adapter and self.lora_rank is not None:
            raise ValueError(
                f"--lora-rank: {self.model} is an adapter already, which trains on as it is; leave "
                "the option out"
            )
        if self.merge_adapter and not self.has_adapter:
            raise ValueError("--merge-adapter needs an adapter: give --lora-rank")

    @property
    def has_folder_of_adapter(self) -> bool:
        """Whether the folder holds an adapter of PEFT, no model."""
        return self.model is not None and (self.model / "adapter_config.json").is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.lora_rank is not None or self.has_folder_of_adapter


@dataclass(kw_only=True)
class CausalModelOptions(ModelOptions):
    """Model."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "weight of the balancing loss of a mixture of experts; without it the weight "
            "that the model's configuration says; 0: none"
        },
    )

    def check(self) -> None:
        """Raises as `ModelOptions`, and for a weight below 0."""
        super().check()
        if self.router_aux_loss_coef is not None and not self.router_aux_loss_coef >= 0:
            raise ValueError(
                f"--router-aux-loss-coef must not be negative, got {self.router_aux_loss_coef}"
            )


@dataclass(kw_only=True)
class PolicyModelOptions(CausalModelOptions):
    """Model."""

    adapter_reference: Literal["base", "start"] = field(
        default="base",
        metadata={
            "help": "what an adapted policy is compared with: base, the model without the adapter, "
            "or start, the adapter as it began"
        },
    )

    def check(self) -> None:
        """Raises as `CausalModelOptions`, and for a start of no adapter."""
        super().check()
        if self.adapter_reference != "base" and not self.has_adapter:
            raise ValueError(
                f"--adapter-reference {self.adapter_reference} needs an adapter: give --lora-rank"
            )
