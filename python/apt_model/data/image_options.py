"""Options of images: their size, and what becomes of transparency and of enormous files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

LARGEST = 1024 * 1024 * 1024 // 4 // 3  # pixels, as Pillow: a quarter GiB of 24-bit colours
COLOR = re.compile(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})|[a-zA-Z]+")


@dataclass(kw_only=True)
class ImageOptions:
    """Images."""

    image_size: int | None = field(
        default=None,
        metadata={
            "help": "pixels of a side of the images of a folder; without it the size of the "
            "model's image processor or configuration, else 32"
        },
    )
    channels: Literal[1, 3] = field(
        default=3, metadata={"help": "channels of the images of a folder"}
    )
    background: str = field(
        default="white",
        metadata={
            "metavar": "COLOR",
            "help": "color behind transparent pixels, a name or #rrggbb",
        },
    )
    max_pixels: int = field(
        default=LARGEST,
        metadata={"metavar": "N", "help": "images of more pixels cannot be used"},
    )
    image_array: str | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "array of a .npz file that holds several"},
    )

    def check(self) -> None:
        """Raises ValueError that names the option, what was expected and what came."""
        for name in ("image_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not COLOR.fullmatch(self.background):
            raise ValueError(
                f"--background: expected a color such as white or #rrggbb, got {self.background!r}"
            )
