"""What a run of a command reads and leaves: its settings, whole files, the order of its batches."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch


def settings_of(options: Namespace, ignored: Collection[str], data: Path) -> dict[str, Any]:
    """Returns what a run depends on: a checkpoint of anything else must not be continued.

    Args:
        options: of the command.
        ignored: names of options that change nothing.
        data: a file or a folder, told by its content or by the names and sizes in it.
    """
    settings = {
        name: os.fspath(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ignored
    }
    if data.is_dir():
        files = sorted(path for path in data.rglob("*") if path.is_file())
        text = "\n".join(f"{path.relative_to(data)} {path.stat().st_size}" for path in files)
        content = text.encode()
    else:
        content = data.read_bytes()
    return {**settings, "data_sha256": hashlib.sha256(content).hexdigest()}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a name beside `path` and renames what it made, so none is half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(unfinished, path)


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
