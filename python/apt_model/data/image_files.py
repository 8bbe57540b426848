"""Images of a folder: found once each, turned upright, in the colors that a viewer would show."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".dib", ".gif", ".webp",
    ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
SHOWN = 20  # messages about files that cannot be used
WHITE_OF_16_BITS = np.iinfo(np.uint16).max


def image_files(folder: Path, report: Callable[[str], Any]) -> list[Path]:
    """Returns the files of images below a folder, in the order of their paths.

    Links are followed, and what several links lead to is taken once, so that a loop of links ends.
    Hidden files and folders and files of other kinds are left out; `report` is told how many.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[Any] = set()

    def refused(error: OSError) -> None:
        report(f"{error.filename}: {error.strerror} (folder skipped)")

    walk = os.walk(folder, followlinks=True, onerror=refused)
    for parent, folders, names in walk:
        left_out["hidden files or folders"] += _remove_hidden(folders) + _remove_hidden(names)
        _remove_seen(Path(parent), folders, seen, left_out)
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                found.append(Path(parent, name))
            else:
                kind = Path(name).suffix.lower() or "no suffix"
                left_out[f"files of another kind ({kind})"] += 1
    files: dict[str, Path] = {}
    for file in sorted(found):
        if files.setdefault(os.path.realpath(file), file) is not file:
            left_out["links to images that are there already"] += 1
    for kind, count in sorted(left_out.items()):
        if count:
            report(f"{folder}: {count} {kind} left out")
    return sorted(files.values())


def _remove_hidden(names: list[str]) -> int:
    kept = [name for name in names if not name.startswith(".")]
    removed = len(names) - len(kept)
    names[:] = kept
    return removed


def _remove_seen(parent: Path, folders: list[str], seen: set[str], left_out: Counter[str]) -> None:
    """Removes folders that were walked before, by another way."""
    seen.add(os.path.realpath(parent))
    folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))  # links come last
    kept = []
    for name in folders:
        real = os.path.realpath(parent / name)
        if real in seen:
            left_out["links to folders that are there already"] += 1
        else:
            seen.add(real)
            kept.append(name)
    folders[:] = kept


def read_image(
    file: Path, channels: int, background: str = "white", max_pixels: int | None = None
) -> Any:
    """Returns the first frame of a file as an image of Pillow, upright and opaque.

    Args:
        file: of any kind that Pillow reads.
        channels: 3: its mode is "RGB"; 1: "L". Grey images of more than 8 bits have mode "F", from
            0 (black) to 1 (white). `info["frames"]` is how many frames the file has.
        background: what shines through transparent pixels, as `PIL.ImageColor` reads it.
        max_pixels: larger images are refused before they are decoded; None: none are.

    Raises:
        ValueError: the file cannot be used; the message says why, in one line.
    """
    from PIL import Image, ImageOps

    if file.exists() and not file.is_file():
        raise ValueError("is no regular file")  # a pipe would be waited for
    try:
        with _limited(max_pixels), Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            made = ImageOps.exif_transpose(image)
            if made.mode == "F" or made.mode.startswith("I"):
                made = _grey(made, background)
            else:
                made = _opaque(made, background).convert("L" if channels == 1 else "RGB")
            made.info["frames"] = frames
            return made
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"has more than {max_pixels} pixels (--max-pixels)") from None
    except Image.UnidentifiedImageError:
        size = file.stat().st_size
        raise ValueError("is no image" if size else "is empty (0 bytes)") from None
    except MemoryError:
        raise ValueError("does not fit into memory") from None
    except Exception as error:  # whatever Pillow's readers meet in a damaged file
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(text or f"is damaged ({type(error).__name__})") from None


@contextmanager
def _limited(max_pixels: int | None) -> Iterator[None]:
    """Within this context Pillow refuses larger images, and says nothing of those it warns of."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _opaque(image: Any, background: str) -> Any:
    """Returns an image of 8 bits over a background."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    front = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", front.size, background), front).convert("RGB")


def _grey(image: Any, background: str) -> Any:
    """Returns a grey image of more than 8 bits, which `convert` would clip, as floats."""
    from PIL import Image, ImageColor

    values = np.asarray(image)
    white = 1 if image.mode == "F" else WHITE_OF_16_BITS  # Pillow's "I" is of 16-bit files
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(
            f"values from {values.min()} to {values.max()}, expected 0 (black) to {white} (white)"
        )
    scaled = values.astype(np.float32) / white
    key = image.info.get("transparency")
    if isinstance(key, int):  # one grey that is transparent
        grey = ImageColor.getcolor(background, "L")
        assert isinstance(grey, int)  # a mode of one channel
        scaled[values == key] = grey / 255
    return Image.fromarray(scaled)


def as_pixels(image: Any, size: int, channels: int) -> np.ndarray:
    """Returns `(channels, size, size)` in [0, 1], float32, of what `read_image` returned."""
    pixels = np.asarray(image.resize((size, size)), dtype=np.float32)
    if image.mode == "F":
        return np.repeat(pixels.clip(0, 1)[None], channels, axis=0)
    return np.moveaxis(pixels.reshape(size, size, channels) / 255, -1, 0)
