"""Tokenizers and saved folders of the commands that train encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..scoring.model_access import without_wrapper
from .evaluation import mean_over_rows
from .job import pretrained


def tokenizer_with_mask(options: Any, needed: bool = True) -> Any:
    """Returns the tokenizer of the options' model, which must have a mask token where needed."""
    tokenizer = pretrained(options, "AutoTokenizer")
    if needed and tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {options.model.model} has no mask token")
    return tokenizer


def evaluate(trainer: Any, data: Any, batch_size: int, at_least: int = 1) -> dict[str, float]:
    """Returns the losses and accuracies of `eval_step` on all of the data.

    They are means over samples; those of masked tokens are means over the tokens.

    Args:
        trainer: a trainer of encoders.
        data: makes batches of the numbers of its samples.
        batch_size: samples at once, at most.
        at_least: samples at once, at least.
    """

    def measure(rows: list[int]) -> dict[str, float]:
        return trainer.eval_step(**data(rows, 0))

    weights = {"mlm": "num_masked"}
    if getattr(trainer, "nsp_head", None) is None:  # the total is the loss of masked tokens
        weights["total"] = "num_masked"
    figures = mean_over_rows(range(len(data)), batch_size, measure, at_least, weights)
    return {name: v for name, v in figures.items() if name.endswith(("loss", "accuracy"))}


def save_mlm(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model, tokenizer and heads into a folder."""
    without_wrapper(trainer.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    heads = {"mlm_head": trainer.mlm_head, "nsp_head": trainer.nsp_head}
    state = {name: head.state_dict() for name, head in heads.items() if head is not None}
    torch.save(state, folder / "heads.pt")


def save_encoder(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """Writes encoder, projection and, where there is one, tokenizer or image processor."""
    encoder = without_wrapper(trainer.encoder)
    if hasattr(encoder, "save_pretrained"):
        encoder.save_pretrained(folder)
    else:
        folder.mkdir()
        torch.save(encoder.state_dict(), folder / "encoder.pt")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.save(trainer.projection.state_dict(), folder / "projection.pt")
