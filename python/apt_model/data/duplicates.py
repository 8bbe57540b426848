"""Rows that say the same, and an order that keeps them out of one batch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence


def groups_of(rows: Sequence[Sequence[str]]) -> list[int]:
    """Returns of each row the number of its group: rows that share a text are of one group.

    Args:
        rows: the texts of each row; upper and lower case and spaces are told apart.
    """
    parents: list[int] = list(range(len(rows)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    first: dict[str, int] = {}
    for number, texts in enumerate(rows):
        for text in texts:
            parents[root(number)] = root(first.setdefault(text, number))
    return [root(number) for number in range(len(rows))]


def count_batches(groups: Sequence[int], batch_size: int, whole: bool) -> int:
    """Returns how many batches an epoch has in which no batch holds two rows of one group.

    Args:
        groups: of each row the number of its group.
        batch_size: rows a batch.
        whole: a smaller batch at the end is left out.
    """
    sizes = Counter(groups).values()
    count = len(groups)
    while True:
        batches = max(1, count // batch_size) if whole else -(-count // batch_size)
        placed = sum(min(size, batches) for size in sizes)
        if placed == count:
            return batches
        count = placed


def batches_apart(
    order: Sequence[int], groups: Sequence[int], batch_size: int, batches: int
) -> list[list[int]]:
    """Returns the rows of each batch of an epoch; no batch holds two rows of one group.

    Where a group has more rows than there are batches the rows beyond are left out; which ones,
    the order decides.

    Args:
        order: row numbers in the order of the epoch.
        groups: of each row the number of its group.
        batch_size: rows a batch, at most.
        batches: number of batches.
    """
    members: dict[int, list[int]] = {}
    for row in order:
        members.setdefault(groups[row], []).append(row)
    made: list[list[int]] = [[] for _ in range(batches)]
    emptiest = [(0, number) for number in range(batches)]
    for rows in sorted(members.values(), key=len, reverse=True):
        taken = []
        for row in rows[:batches]:
            filled, number = heapq.heappop(emptiest)
            if filled < batch_size:
                made[number].append(row)
                filled += 1
            taken.append((filled, number))
        for item in taken:
            heapq.heappush(emptiest, item)
    return made
