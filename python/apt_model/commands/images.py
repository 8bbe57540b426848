"""Images for the commands: as the options say, or as the image processor of a model wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.images import ImageViews, is_of_timm, load_images
from ..pretraining.encoder import Encoder
from ..pretraining.views import pool
from ..scoring.devices import device_of, evaluating
from .messages import say

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SIZE = 32  # of a side, where neither options nor model say more


def read_processor(options: Any) -> Any:
    """Returns the image processor in the folder of the options' model; None where there is none.

    A size that the options name replaces the size of the processor.
    """
    folder, size = options.model.model, options.images.image_size
    if folder is None or not (
        any((folder / name).is_file() for name in PROCESSORS) or _is_of_timm(folder)
    ):
        return None
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the image processor in {folder} cannot be used: {text}") from None
    if size is not None and is_of_timm(processor):
        settings = processor.data_config
        input_size = (settings["input_size"][0], size, size)
        return type(processor)(pretrained_cfg={**settings, "input_size": input_size})
    if size is not None:
        for name in ("size", "crop_size"):
            known = getattr(processor, name, None)
            if known is not None:
                setattr(processor, name, {side: size for side in dict(known) if known[side]})
    return processor


def _is_of_timm(folder: Path) -> bool:
    """Returns whether a model is of timm: its configuration says how images are processed."""
    return _config_of(folder).get("model_type") == "timm_wrapper"


def load_views(
    options: Any,
    path: Path,
    seed: int,
    processor: Any = None,
    counts: Counter[str] | None = None,
    report: Callable[[str], Any] = say,
) -> ImageViews:
    """Returns the images of a folder or an array, which make the views of contrastive learning.

    Args:
        options: of the command.
        path: of the images.
        seed: of the views.
        processor: what `read_processor` returned.
        counts: where images that are skipped are counted.
        report: is told of them.
    """
    images, config = options.images, _config_of(options.model.model)
    size = images.image_size or config.get("image_size") or SIZE
    loaded = load_images(
        path,
        max(size) if isinstance(size, (list, tuple)) else size,
        images.channels,
        fail_on_bad_image=options.run.bad_rows == "fail",
        report=report,
        background=images.background,
        max_pixels=images.max_pixels,
        array=images.image_array,
        processor=processor,
        counts=counts,
    )
    return ImageViews(loaded, seed, flip=options.views.flip)


def _config_of(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).to_dict()


@torch.no_grad()
def width_of(encoder: torch.nn.Module, data: ImageViews) -> int:
    """Returns the width of an encoder's features, as it answers to an image of the data.

    Raises:
        ValueError: the encoder does not take such images.
    """
    image = data([0], 0)["input_ids_1"].to(device_of(encoder))
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), image.dtype)
    with evaluating(encoder):
        try:
            hidden = Encoder(encoder)(image.to(dtype)).hidden
        except (RuntimeError, ValueError, AssertionError) as error:  # timm asserts sizes
            text = " ".join(str(error).split())
            shape = tuple(image.shape[1:])
            raise ValueError(f"the model does not take images of shape {shape}: {text}") from None
    return pool(hidden, None, "mean").shape[-1]
