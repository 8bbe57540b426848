"""Images from folders and NumPy arrays, two changed forms of each, and a small encoder."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import image_arrays
from .image_files import SHOWN, SUFFIXES, as_pixels, image_files, read_image
from .image_options import LARGEST
from .order import generator_of


def load_images(
    path: Path,
    size: int | None = None,
    channels: int = 3,
    *,
    fail_on_bad_image: bool = False,
    report: Callable[[str], Any] = lambda message: print(message, file=sys.stderr),
    background: str = "white",
    max_pixels: int | None = LARGEST,
    array: str | None = None,
    processor: Any = None,
    counts: Counter[str] | None = None,
) -> Tensor:
    """Returns images `(N, C, H, W)`, float32.

    Args:
        path: a folder of images, searched to its depths as `image_files` does, scaled to [0, 1]
            (of 8 or 16 bits, or grey ones of floats that are in it); or a `.npy`/`.npz` array
            `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)`, of which integers are divided by the
            largest of their dtype and floats taken as they are.
        size: pixels of a side, for folders: needed there, unless there is a processor.
        channels: 1 or 3, for folders.
        fail_on_bad_image: True: a file that cannot be read is an error; False: it is left out, and
            `report` is told.
        report: called with one message a file for the first 20 of them, and with what is left out.
        background: what shines through transparent pixels of files.
        max_pixels: files of larger images cannot be used.
        array: name of the array in a `.npz` file that holds several.
        processor: an image processor of Hugging Face; it sizes, scales and normalizes the images.
        counts: how many images are skipped is counted here, as "images_skipped".

    Raises:
        ValueError: no image can be used, or the array is none of images; also where its integers
            use less than 1/128 of their dtype's range, which would make them black.
    """
    told = SkippedImages(report, counts)
    channels = _channels_of(processor, channels)
    if path.is_dir():
        if size is None and processor is None:
            raise ValueError("the size of the images in a folder must be given")

        def read(file: Path) -> Tensor:
            image = read_image(file, channels, background, max_pixels)
            told.frames += image.info["frames"] > 1
            if processor is not None:
                return _processed(processor, image, channels)
            assert size is not None  # checked above
            return torch.from_numpy(as_pixels(image, size, channels))

        images = _of_folder(path, read, fail_on_bad_image, told)
    else:
        images = _of_array(path, array, fail_on_bad_image, told, processor, channels)
    told.finish(path)
    if not len(images):
        raise ValueError(f"{path}: no image can be used")
    return images


class SkippedImages:
    """Names the first images that are skipped, and counts the others.

    Args:
        report: called with one message.
        counts: where they are counted, or None.
    """

    def __init__(self, report: Callable[[str], Any], counts: Counter[str] | None) -> None:
        self.report, self._counts = report, counts
        self._skipped = 0
        self.frames = 0  # files with more frames than the first

    def __call__(self, message: str) -> None:
        """Tells of one image."""
        self._skipped += 1
        if self._skipped <= SHOWN:
            self.report(message)

    def finish(self, path: Path) -> None:
        """Tells of those that were not named, and of frames that are left out."""
        if self.frames:
            self.report(f"{path}: of {self.frames} files with several frames the first is taken")
        if self._skipped > SHOWN:
            self.report(f"{path}: {self._skipped - SHOWN} more images skipped")
        if self._counts is not None and self._skipped:
            self._counts["images_skipped"] += self._skipped


def _of_folder(
    folder: Path, read: Callable[[Path], Tensor], fail: bool, told: SkippedImages
) -> Tensor:
    images = []
    for file in image_files(folder, told.report):
        try:
            images.append(read(file))
        except ValueError as error:
            if fail:
                raise ValueError(f"{file}: {error}") from None
            told(f"{file}: {error} (image skipped)")
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder}: the model's image processor makes images of several sizes, "
            f"{sorted(sizes)[:3]}: give it a size and a crop"
        )
    return torch.stack(images) if images else torch.empty(0)


def is_of_timm(processor: Any) -> bool:
    """Returns whether an image processor of Hugging Face is one around timm's transforms."""
    return hasattr(processor, "data_config")


def _channels_of(processor: Any, channels: int) -> int:
    """Returns how many channels an image processor normalizes; without one `channels`."""
    mean = getattr(processor, "image_mean", None)
    if processor is None:
        return channels
    if is_of_timm(processor):
        mean = list(processor.data_config["mean"])
    return len(mean) if isinstance(mean, (list, tuple)) and len(mean) in (1, 3) else 3


def _processed(processor: Any, image: Any, channels: int) -> Tensor:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    return processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def _of_array(
    path: Path, name: str | None, fail: bool, told: SkippedImages, processor: Any, channels: int
) -> Tensor:
    if path.suffix.lower() not in image_arrays.SUFFIXES:
        kind = "one image" if path.suffix.lower() in SUFFIXES else f"a {path.suffix or 'file'}"
        raise ValueError(
            f"{path}: expected a folder of images or an array of them, .npy or .npz, got {kind}"
        )
    array = image_arrays.load_array(path, name)
    pixels = image_arrays.channels_first(image_arrays.scaled(path, array))
    images = torch.from_numpy(image_arrays.finite(path, pixels, fail, told)).contiguous()
    if processor is None or not len(images):
        return images
    low, high = images.aminmax()
    if low < 0 or high > 1 or images.shape[1] not in (1, channels):
        raise ValueError(
            f"{path}: the model's image processor takes {channels} channels, or grey images, of "
            f"values from 0 to 1, got {images.shape[1]} from {float(low):g} to {float(high):g}"
        )
    images = images.expand(-1, channels, -1, -1)
    more = {} if is_of_timm(processor) else {"do_rescale": False}  # timm rescales no floats
    return processor(images=images, return_tensors="pt", **more)["pixel_values"].float()


class ImageViews:
    """The batches of contrastive learning: two randomly changed forms of every image.

    Every view is turned, scaled and moved a little, its contrast and brightness are changed, and
    noise is added. Reproducible by seed and step.

    Args:
        images: `(N, C, H, W)`.
        seed: of the changes.
        degrees: views are turned by up to so many.
        scale: views are larger or smaller by up to this share.
        shift: views are moved by up to this share of a side.
        jitter: contrast and brightness change by up to this share.
        noise: standard deviation of what is added, as a share of the images' own.
        flip: turn half of the views left to right.
    """

    def __init__(
        self,
        images: Tensor,
        seed: int = 0,
        degrees: float = 15.0,
        scale: float = 0.2,
        shift: float = 0.12,
        jitter: float = 0.3,
        noise: float = 0.1,
        flip: bool = False,
    ) -> None:
        self._images, self._seed = images, seed
        self._angle, self._scale, self._shift = math.radians(degrees), scale, shift
        self._jitter, self._noise, self._flip = jitter, noise * float(images.std()), flip

    def __len__(self) -> int:
        return len(self._images)

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `ContrastivePretrainer.train_step`."""
        generator = generator_of("images", self._seed, step)
        images = self._images[rows]
        views = {f"input_ids_{k}": self.view(images, generator) for k in (1, 2)}
        return {**views, "sample_ids": torch.tensor(rows)}

    def view(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Returns one changed form of each image `(B, C, H, W)`."""

        def spread(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, generator=generator) * 2 - 1

        angle, scale = self._angle * spread(), 1 + self._scale * spread()
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        mirrored = torch.where(spread() > 0, 1.0, -1.0) if self._flip else torch.ones_like(cos)
        move = 2 * self._shift * spread(2)
        rows = (
            torch.stack([cos * mirrored, -sin, move[:, 0]], 1),
            torch.stack([sin * mirrored, cos, move[:, 1]], 1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        views = views * (1 + self._jitter * spread(1, 1, 1))
        views = views + self._jitter * float(images.std()) * spread(1, 1, 1)
        return views + self._noise * torch.randn(views.shape, generator=generator)


class SmallCNN(nn.Module):
    """Three convolutions and a mean over the picture: an encoder `(B, C, H, W)` to `(B, width)`.

    Args:
        channels: of the images.
        width: of the output.
    """

    def __init__(self, channels: int = 1, width: int = 128) -> None:
        super().__init__()
        widths = (channels, width // 4, width // 2, width)
        self.layers = nn.Sequential(
            *(
                layer
                for i in range(3)
                for layer in (
                    nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, stride=1 + (i == 1)),
                    nn.ReLU(),
                )
            )
        )
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """Returns `(B, width)`."""
        return self.layers(images).mean((2, 3))
