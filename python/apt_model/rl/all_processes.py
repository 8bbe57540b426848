"""The rows of all data-parallel processes, for what PPO takes of every token at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rows_of_all(
    first: Tensor, second: Tensor, mask: Tensor, groups: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, tuple[slice, slice]]:
    """Returns what the processes of `groups` hold, `(B, T)` each, and where one's own part is.

    Rows and columns that a process has less than another are masked. Without groups nothing is
    copied.
    """
    rows, columns = mask.shape
    if not groups:
        return first, second, mask, (slice(rows), slice(columns))
    most = torch.tensor([rows, columns], device=mask.device)
    for group in groups:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    below, right = (most - most.new_tensor([rows, columns])).tolist()
    dtype = torch.promote_types(first.dtype, second.dtype)
    held = [F.pad(t.to(dtype), (0, right, 0, below)) for t in (first, second, mask != 0)]
    every, begin = torch.stack(held), 0
    for group in groups:
        parts = [torch.empty_like(every) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, every, group=group)
        begin += dist.get_rank(group) * every.shape[1]
        every = torch.cat(parts, dim=1)
    return every[0], every[1], every[2] != 0, (slice(begin, begin + rows), slice(columns))
