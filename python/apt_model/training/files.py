"""What a run of a command reads and leaves: its settings, whole files, the order of its batches."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


def settings_of(
    options: Namespace, ignored: Collection[str], data: Path, **inputs: Path
) -> dict[str, Any]:
    """Returns what a run depends on: a checkpoint of anything else must not be continued.

    Args:
        options: of the command; paths among them are told by their names.
        ignored: names of options that change nothing.
        data: a file or a folder, told by its content or by the names and sizes in it.
        **inputs: others that are told so.
    """
    settings = {
        name: os.fspath(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ignored
    }
    inputs = {"data": data, **inputs}
    return {**settings, **{f"{name}_sha256": _sha256(path) for name, path in inputs.items()}}


def _sha256(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = "\n".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
        content = text.encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a name beside `path` and renames the file or folder it made there.

    What was at `path` stays until the new one is complete and on the disk.

    Raises:
        OSError: the system refused; the message names `path`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(unfinished)  # of a process of the same number that was killed
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            _to_disk(unfinished)
            _replace(path, unfinished)
    finally:
        _remove(unfinished)


def save_tensors(path: Path, state: Any) -> None:
    """Writes what `torch.load` reads, as `write_whole`."""

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:  # given a name, torch.save does not say why it failed
            torch.save(state, file)

    write_whole(path, write)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context what the system refuses is an `OSError` that names `path`."""
    try:
        yield
    except Exception as error:
        if (reason := _refusal(error)) is None:
            raise
        raise OSError(f"{path} cannot be written: {reason}") from error


def _refusal(error: BaseException | None) -> str | None:
    """Returns what the system said, also where PyTorch or safetensors raised something else."""
    while error is not None:
        if isinstance(error, OSError) or "(os error " in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _to_disk(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def _replace(path: Path, unfinished: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():  # unlike a file it cannot be replaced in one step
        _remove(old)
        os.replace(path, old)
    os.replace(unfinished, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def generator_of(*keys: int | str) -> torch.Generator:
    """Returns a generator whose random numbers belong to these keys alone.

    PyTorch's generator on the CPU takes 32 bits of a seed: keys are mixed, not put side by side.
    """
    name = "/".join(map(str, keys))
    return torch.Generator().manual_seed(random.Random(name).getrandbits(32))


class EpochBatches:
    """Batches of every epoch, each in an order of its own that only the seed decides.

    Args:
        count: how many samples there are, at least one.
        batch_size: samples a batch.
        seed: of the orders.
        collate: returns the arguments of `train_step` of the samples of these numbers; also told
            the step.
        whole: leave out an epoch's last batch where it would be smaller.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        collate: Callable[[list[int], int], Mapping[str, Any]],
        whole: bool = False,
    ) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._collate = collate
        self.per_epoch = max(1, count // batch_size) if whole else -(-count // batch_size)

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """Returns the batch of step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.per_epoch)
        generator = generator_of("order", self._seed, epoch)
        order = torch.randperm(self._count, generator=generator).tolist()
        start = position * self._batch_size
        return self._collate(order[start : start + self._batch_size], step)
