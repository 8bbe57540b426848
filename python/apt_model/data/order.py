"""The order in which a run reads its rows: decided by the seed alone, and cut into batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def generator_of(*keys: int | str) -> torch.Generator:
    """Returns a generator whose random numbers belong to these keys alone."""
    return torch.Generator().manual_seed(hash_of(*keys))


def hash_of(*keys: int | str) -> int:
    """Returns a seed that belongs to these keys alone, of 32 bits, as the CPU's generator takes.

    Keys are mixed, not added: epoch 1 of seed 0 has nothing in common with epoch 0 of seed 1.
    """
    return random.Random("/".join(map(str, keys))).getrandbits(32)


class ShuffledBatches:
    """Batches of every epoch, each epoch in an order of its own that only the seed decides.

    Args:
        count: number of rows, at least one.
        batch_size: rows a batch.
        seed: seed of the orders.
        collate: makes the arguments of `train_step` of the rows with these numbers; it is also
            told the step.
        whole: leave out the last batch of an epoch where it would be smaller.
        share: returns the part of a batch's rows that this process trains on; None: all of them.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        collate: Callable[[list[int], int], Mapping[str, Any]],
        whole: bool = False,
        share: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(
                f"count and batch_size: expected at least 1, got {count} and {batch_size}"
            )
        self.count, self.batch_size = count, batch_size
        self._seed, self._collate, self._share = seed, collate, share
        self.per_epoch = max(1, count // batch_size) if whole else -(-count // batch_size)
        self._epoch, self._order = -1, []

    def rows(self, step: int) -> list[int]:
        """Returns the numbers of all rows of step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = generator_of("order", self._seed, epoch)
            self._order = torch.randperm(self.count, generator=generator).tolist()
            self._epoch = epoch
        start = position * self.batch_size
        return self._order[start : start + self.batch_size]

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """Returns the arguments of `train_step` of step `step`."""
        rows = self.rows(step)
        return self._collate(rows if self._share is None else self._share(rows), step)


def of_rows(
    rows: Sequence[Any], make_batch: Callable[[Sequence[Any]], Mapping[str, Any]]
) -> Callable[[list[int], int], Mapping[str, Any]]:
    """Returns the `collate` of `ShuffledBatches` for rows in memory."""
    return lambda numbers, step: make_batch([rows[number] for number in numbers])
