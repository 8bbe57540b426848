"""The folder of a trained encoder of images: written, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import SmallCNN
from ..scoring.loading import load_model
from ..scoring.model_access import without_wrapper
from ..scoring.saving import save_model

WEIGHTS, CONFIGURATION = "encoder.pt", "encoder.json"


def save_image_encoder(
    encoder: nn.Module, folder: Path, processor: Any = None, merge_adapter: bool = False
) -> None:
    """Writes an encoder of images into a folder, for `load_image_encoder`.

    Args:
        encoder: of transformers, then transformers loads it too; or a `SmallCNN`.
        folder: made where it is not there.
        processor: the image processor of transformers whose pictures it was trained on; None.
        merge_adapter: write an adapter and its model as one.

    Raises:
        ValueError: the encoder is of neither kind, so that nothing could load it.
    """
    encoder = without_wrapper(encoder)
    if hasattr(encoder, "save_pretrained"):
        save_model(encoder, folder, processor, merge_adapter)
        return
    if not isinstance(encoder, SmallCNN):
        raise ValueError(
            f"encoder: expected a model of transformers or a SmallCNN, got {type(encoder).__name__}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    first: Any = encoder.layers[0].weight
    settings = {"kind": "SmallCNN", "channels": first.shape[1], "width": encoder.width}
    (folder / CONFIGURATION).write_text(json.dumps(settings, indent=2) + "\n")
    torch.save(encoder.state_dict(), folder / WEIGHTS)


def load_image_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the encoder of a folder of `save_image_encoder`, or of transformers.

    Raises:
        ValueError: the folder is of an encoder that is not known.
    """
    folder = Path(folder)
    if not (folder / CONFIGURATION).is_file():
        return load_model(folder, "AutoModel", dtype)
    settings = json.loads((folder / CONFIGURATION).read_text())
    if (kind := settings.pop("kind", None)) != "SmallCNN":
        raise ValueError(f"{folder / CONFIGURATION}: kind: expected SmallCNN, got {kind!r}")
    encoder = SmallCNN(**settings).to(dtype)
    encoder.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
    return encoder
