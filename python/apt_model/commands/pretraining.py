"""Tokenizers and saved folders of the commands that train encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..pretraining.encoder_folder import save_image_encoder
from ..scoring.saving import save_model, save_sentence_transformer
from .evaluation import mean_over_rows
from .job import pretrained
from .messages import say

HEADS, PROJECTION = "heads.pt", "projection.pt"


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
    if "nsp_loss" in figures:  # of means over tokens and over samples
        config = trainer.config
        figures["total_loss"] = (
            config.mlm_loss_weight * figures["mlm_loss"]
            + config.nsp_loss_weight * figures["nsp_loss"]
        )
    return {name: v for name, v in figures.items() if name.endswith(("loss", "accuracy"))}


def save_mlm(trainer: Any, tokenizer: Any, options: Any, folder: Path) -> None:
    """Writes model and tokenizer, and heads that are not the model's own, into a folder."""
    save_model(trainer.model, folder, tokenizer, options.model.merge_adapter)
    if state := _heads(trainer, trained=True):
        torch.save(state, folder / HEADS)


def load_heads(trainer: Any, folder: Path) -> None:
    """Goes on with the heads that an earlier stage wrote beside its model, where there are any."""
    if (folder / HEADS).is_file():
        state = torch.load(folder / HEADS, map_location="cpu", weights_only=True)
        for name, head in _heads(trainer).items():
            if name in state:
                head.load_state_dict(state[name])


def _heads(trainer: Any, trained: bool = False) -> dict[str, Any]:
    """Returns the heads that the trainer made; `trained`: their states."""
    heads = {"mlm_head": trainer.mlm_head, "nsp_head": trainer.nsp_head}
    own = {name: head for name, head in heads.items() if head is not None and head.state_dict()}
    return {name: head.state_dict() for name, head in own.items()} if trained else own


def save_encoder(
    trainer: Any, tokenizer: Any, processor: Any, options: Any, max_length: int | None, folder: Path
) -> None:
    """Writes encoder, projection and, where there is one, tokenizer or image processor.

    sentence-transformers loads an encoder of texts, `load_image_encoder` one of images.
    """
    if tokenizer is not None:
        assert max_length is not None  # of texts it is known
        save_sentence_transformer(
            trainer.encoder, folder, tokenizer, options.loss.pooling, trainer.hidden_size,
            max_length,
        )  # fmt: skip
    else:
        save_image_encoder(trainer.encoder, folder, processor, options.model.merge_adapter)
    torch.save(trainer.projection.state_dict(), folder / PROJECTION)


def load_projection(trainer: Any, folder: Path | None) -> None:
    """Goes on with the projection of an earlier stage, where there is one of the same size."""
    if folder is None or not (folder / PROJECTION).is_file():
        return
    state = torch.load(folder / PROJECTION, map_location="cpu", weights_only=True)
    own = {name: value.shape for name, value in trainer.projection.state_dict().items()}
    if own == {name: value.shape for name, value in state.items()}:
        trainer.projection.load_state_dict(state)
    else:
        say(f"{folder / PROJECTION} has other sizes and is left out")
