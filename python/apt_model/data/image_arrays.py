"""Images in NumPy's files, and what is wrong with such a file in plain words."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".npy", ".npz")
DIMENSIONS = (3, 4)


def load_array(file: Path, name: str | None = None) -> np.ndarray:
    """Returns the array of images of a `.npy` or `.npz` file.

    Args:
        file: of NumPy.
        name: of an array in a `.npz` file; None: the only one that can be of images.

    Raises:
        ValueError: the file cannot be read, or holds no array of images or several.
    """
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes)")
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            arrays = {"": loaded}
        else:
            with loaded:
                names = loaded.files if name is None else [n for n in loaded.files if n == name]
                if name is not None and not names:
                    raise ValueError(f"has no array {name!r}; it has {', '.join(loaded.files)}")
                arrays = {key: _of_archive(loaded, key, len(names)) for key in names}
    except MemoryError:
        raise ValueError(f"{file} does not fit into memory") from None
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} {_reason(file, error)}") from None
    return _one_of(file, arrays)


def _of_archive(loaded: Any, name: str, count: int) -> np.ndarray | None:
    try:
        return loaded[name]
    except ValueError as error:
        if count == 1 or "allow_pickle" not in str(error):
            raise
        return None  # objects, beside arrays of numbers


def _reason(file: Path, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if text.startswith("has no array"):
        return text
    if "Object arrays" in text:
        return "holds Python objects: save one array of numbers, all images of one size"
    with open(file, "rb") as opened:
        begin = opened.read(6)
    if begin[:2] == b"PK" or begin == b"\x93NUMPY":
        return "is damaged: its end is missing, or bytes were changed; save it again"
    return "is no file of NumPy (.npy, .npz)"


def _one_of(file: Path, arrays: dict[str, np.ndarray | None]) -> np.ndarray:
    """Returns the only array that can be of images."""
    fitting = {name: a for name, a in arrays.items() if a is not None and _problem(a) is None}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        listed = ", ".join(f"{name} {array.shape}" for name, array in fitting.items())
        raise ValueError(
            f"{file} holds {len(fitting)} arrays of images ({listed}): name one (--image-array)"
        )
    wanted = "must be an array of images (N, H, W), (N, C, H, W) or (N, H, W, C)"
    came = [
        "Python objects" if array is None else str(_problem(array)) for array in arrays.values()
    ] or ["nothing"]
    raise ValueError(f"{file}: {wanted}, got {'; '.join(came)}")


def _problem(array: np.ndarray) -> str | None:
    if array.dtype.kind not in "uifb":
        return f"{array.shape} of {array.dtype}"
    return None if array.ndim in DIMENSIONS and array.size else f"{array.shape}"


def scaled(file: Path, array: np.ndarray) -> np.ndarray:
    """Returns an array of images as float32: integers are divided by the largest of their dtype.

    Raises:
        ValueError: integers that use less than 1/128 of their dtype's range would be black.
    """
    pixels = array.astype(np.float32)
    if array.dtype.kind not in "ui":
        return pixels
    largest = np.iinfo(array.dtype).max
    if array.dtype.itemsize > 1 and array.max() <= largest // 128:
        raise ValueError(
            f"{file}: {array.dtype} up to {array.max()} would be black: 1 is {largest}; save "
            "uint8, uint16 or floats in [0, 1]"
        )
    return pixels / np.float32(largest)


def channels_first(images: np.ndarray) -> np.ndarray:
    """Returns images `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)` as `(N, C, H, W)`."""
    if images.ndim == 3:
        return images[:, None]
    return np.moveaxis(images, -1, 1) if images.shape[1] > 4 >= images.shape[-1] else images


def finite(file: Path, images: np.ndarray, fail: bool, report: Callable[[str], Any]) -> np.ndarray:
    """Returns the images of which all pixels are finite; the others are named."""
    good = np.isfinite(images).reshape(len(images), -1).all(1)
    for number in np.flatnonzero(~good):
        message = f"{file}: image {number} holds values that are not finite"
        if fail:
            raise ValueError(message)
        report(f"{message} (image skipped)")
    return images if good.all() else images[good]
