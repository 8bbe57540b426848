"""Folders of trained models, as the commands that use them read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def model_folder(folder: Path) -> Path:
    """Returns the model inside the output folder of a run, or a model's folder as it is."""
    inside = folder / "model"
    return inside if inside.is_dir() and not (folder / "config.json").exists() else folder


def load_causal(options: Any, folder: Path) -> tuple[Any, Any]:
    """Returns a causal language model, in evaluation mode on its device, and its tokenizer.

    Args:
        options: has `gguf_file`, `dtype` and `device`.
        folder: of a model, or of an adapter that names its base.
    """
    import torch

    from ..scoring.loading import load_model, load_tokenizer

    dtype = getattr(torch, options.dtype)
    model = load_model(folder, "AutoModelForCausalLM", dtype, options.gguf_file, trainable=False)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), load_tokenizer(folder, options.gguf_file)
