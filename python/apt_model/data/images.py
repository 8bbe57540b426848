"""Images from folders and NumPy arrays, two changed forms of each, and a small encoder."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.files import generator_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def load_images(
    path: Path,
    size: int | None = None,
    channels: int = 3,
    *,
    fail_on_bad_image: bool = False,
    report: Callable[[str], Any] = lambda message: print(message, file=sys.stderr),
) -> Tensor:
    """Returns images `(N, C, H, W)`, float32.

    Args:
        path: a folder of images (searched to its depths, in the order of the names), scaled to
            [0, 1]: of 8 or 16 bits, or grey ones of floats that are in it; or a `.npy`/`.npz`
            array `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)`, of which integers are divided by
            the largest of their dtype and floats taken as they are.
        size: pixels of a side, for folders: needed there.
        channels: 1 or 3, for folders.
        fail_on_bad_image: True: a file that cannot be read is an error; False: it is left out, and
            `report` is told.
        report: called with one message a file.

    Raises:
        ValueError: no image can be used, or the array is none of images; also where its integers
            use less than 1/128 of their dtype's range, which would make them black.
    """
    if path.is_dir():
        if size is None:
            raise ValueError("the size of the images in a folder must be given")
        return _from_folder(path, size, channels, fail_on_bad_image, report)
    import numpy as np

    loaded = np.load(path, allow_pickle=False)
    array = loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded
    if array.ndim not in (3, 4) or array.size == 0 or array.dtype.kind not in "uif":
        raise ValueError(f"{path}: must be an array of images (N, H, W[, C]), got {array.shape}")
    pixels = array.astype(np.float32)
    if array.dtype.kind != "f":
        largest = np.iinfo(array.dtype).max
        if array.dtype.itemsize > 1 and array.max() <= largest // 128:
            raise ValueError(
                f"{path}: {array.dtype} up to {array.max()} would be black: 1 is {largest}; save "
                "uint8, uint16 or floats in [0, 1]"
            )
        pixels /= largest
    images = torch.from_numpy(pixels)
    if images.dim() == 3:
        return images.unsqueeze(1)
    return images.movedim(-1, 1) if images.shape[1] > 4 >= images.shape[-1] else images


def _from_folder(
    folder: Path, size: int, channels: int, fail: bool, report: Callable[[str], Any]
) -> Tensor:
    from PIL import Image

    images = []
    for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            with Image.open(file) as image:
                images.append(_pixels(image, size, channels))
        except (OSError, ValueError) as error:
            if fail:
                raise ValueError(f"{file}: {error}") from None
            report(f"{file}: {error} (image skipped)")
    if not images:
        raise ValueError(f"{folder}: no image can be used")
    return torch.stack(images)


def _pixels(image: Any, size: int, channels: int) -> Tensor:
    """Returns `(channels, size, size)` in [0, 1] of an image of Pillow."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        image = image.convert("L" if channels == 1 else "RGB").resize((size, size))
        pixels = torch.from_numpy(np.asarray(image).copy()).float() / 255
        return pixels.view(size, size, channels).movedim(-1, 0)
    grey = np.asarray(image)  # which `convert` would clip to 8 bits
    white = 1 if image.mode == "F" else np.iinfo(np.uint16).max  # Pillow's "I" is of 16-bit files
    if not (grey.min() >= 0 and grey.max() <= white):
        raise ValueError(
            f"values from {grey.min()} to {grey.max()}, expected 0 (black) to {white} (white)"
        )
    scaled = Image.fromarray(grey.astype(np.float32) / white).resize((size, size))
    return torch.from_numpy(np.array(scaled)).clamp(0, 1).expand(channels, -1, -1)


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
        return {f"input_ids_{k}": self.view(images, generator) for k in (1, 2)}

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
