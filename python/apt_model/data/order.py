"""The order in which a run reads its rows: decided by the seed alone, and cut into batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .duplicates import batches_apart, count_batches


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
        groups: of each row the number of its group: no batch holds two rows of one group. Of a
            group with more rows than an epoch has batches each epoch leaves some out.

    Attributes:
        left_out: how many rows an epoch leaves out because of their groups.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        collate: Callable[[list[int], int], Mapping[str, Any]],
        whole: bool = False,
        share: Callable[[list[int]], list[int]] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(
                f"count and batch_size: expected at least 1, got {count} and {batch_size}"
            )
        self.count, self.batch_size = count, batch_size
        self._seed, self._collate, self._share = seed, collate, share
        self._groups = groups if groups is not None and len(set(groups)) < count else None
        numbers = range(count) if self._groups is None else self._groups
        self.per_epoch = count_batches(numbers, batch_size, whole)
        sizes = Counter(numbers).values()
        self.left_out = sum(max(size - self.per_epoch, 0) for size in sizes)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """Returns the numbers of all rows of step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = generator_of("order", self._seed, epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
            self._batches = self._cut(order)
            self._epoch = epoch
        return self._batches[position]

    def _cut(self, order: list[int]) -> list[list[int]]:
        size = self.batch_size
        if self._groups is not None:
            return batches_apart(order, self._groups, size, self.per_epoch)
        return [order[start : start + size] for start in range(0, self.count, size)]

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """Returns the arguments of `train_step` of step `step`."""
        rows = self.rows(step)
        return self._collate(rows if self._share is None else self._share(rows), step)


def of_rows(
    rows: Sequence[Any], make_batch: Callable[[Sequence[Any]], Mapping[str, Any]]
) -> Callable[[list[int], int], Mapping[str, Any]]:
    """Returns the `collate` of `ShuffledBatches` for rows in memory."""
    return lambda numbers, step: make_batch([rows[number] for number in numbers])
