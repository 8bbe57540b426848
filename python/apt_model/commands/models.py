"""Which part of a model is trained, and how the trained model is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..scoring.model_access import train_last_layers, without_wrapper


def trained_part(options: Any, model: Any, none_is_possible: bool = False) -> Any:
    """Returns the model with the parts frozen that the options of a command do not train.

    Args:
        options: of the command.
        model: on any device.
        none_is_possible: whether `--train-last-layers 0` may freeze all of it.
    """
    count = options.model.train_last_layers
    if options.training.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"--gradient-checkpointing: {type(model).__name__} does not have it")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if count == 0 and none_is_possible:
        model.requires_grad_(False)
    elif count is not None:
        train_last_layers(model, count)
    return model


def save_pretrained(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """Returns what writes a Hugging Face model and its tokenizer into a folder."""

    def save(folder: Path) -> None:
        without_wrapper(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save
