"""Trained models as folders that transformers, TRL, vLLM and sentence-transformers load."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..training.files import naming
from .loading import forget_quantization
from .model_access import has_adapter, without_wrapper

SMALL = 2**28  # bytes of a model that is written whole to see whether it can be
SPARE = 2**24  # bytes of tokenizer and configurations


def save_model(
    model: Any, folder: Path, tokenizer: Any = None, merge_adapter: bool = False
) -> None:
    """Writes a model of transformers and its tokenizer into a folder.

    A model with an adapter of PEFT is written as an adapter, or merged into one model.

    Args:
        model: DDP-wrapped or not.
        folder: made where it is not there.
        tokenizer: also anything else that has `save_pretrained`, an image processor say; None.
        merge_adapter: write the merged model.
    """
    model = without_wrapper(model)
    if has_adapter(model):
        forget_quantization(model.get_base_model())
        if merge_adapter:  # of a copy: the trainer may go on with this one
            model = copy.deepcopy(model).merge_and_unload()
    elif hasattr(model, "config"):
        forget_quantization(model)
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"model: expected a model with save_pretrained, got {type(model).__name__}"
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_saving(
    model: nn.Module, tokenizer: Any, folder: Path, merge_adapter: bool = False
) -> None:
    """Raises where `save_model` would fail: to be called before a run, not at its end.

    It writes the model beside `folder` and removes it again: a small one whole, of a large one all
    but the numbers, for which it looks whether there is room.

    Raises:
        ValueError: the model or the tokenizer cannot be saved. OSError: the system refuses.
    """
    parent = Path(folder).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    model = without_wrapper(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if has_adapter(model) and not merge_adapter:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    free = shutil.disk_usage(parent).free
    if size + SPARE > free:
        raise OSError(
            f"{folder} cannot be written: expected {size + SPARE:,} bytes of room, {free:,} are "
            "free"
        )
    with tempfile.TemporaryDirectory(prefix=".try-", dir=parent) as place:
        try:
            with naming(folder):
                if size <= SMALL or not _written_empty(model, Path(place) / "empty"):
                    save_model(model, Path(place) / "whole", tokenizer, merge_adapter)
                elif tokenizer is not None:
                    tokenizer.save_pretrained(Path(place) / "empty")
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be saved: {type(error).__name__}: {error}"
            ) from error


def _written_empty(model: Any, folder: Path) -> bool:
    """Returns whether the model could be saved without its numbers; False says nothing."""
    if has_adapter(model):
        return False
    forget_quantization(model)
    made: dict[int, torch.Tensor] = {}
    state = {
        name: made.setdefault(tensor.data_ptr() or id(tensor), torch.zeros(1))
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    try:
        model.save_pretrained(folder, state_dict=state)
        return True
    except Exception:  # whatever a model does with shapes: written whole it tells
        return False


def save_sentence_transformer(
    model: nn.Module, folder: Path, tokenizer: Any, pooling: str, width: int, max_length: int
) -> None:
    """Writes an encoder of texts so that sentence-transformers loads it too.

    Args:
        model: of transformers; an adapter is merged into it, as only whole models are loaded there.
        folder: made where it is not there.
        tokenizer: the model's.
        pooling: "mean" of the real tokens, or the "first" one.
        width: of the hidden states.
        max_length: tokens of a text; longer ones are cut there.
    """
    save_model(model, folder, tokenizer, merge_adapter=True)
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], 1))]
    modules = [
        {
            "idx": index, "name": str(index), "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]  # fmt: skip
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "first",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }  # fmt: skip
    for path in paths[1:]:
        (Path(folder) / path).mkdir(exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
