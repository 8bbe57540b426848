"""MoCo's bookkeeping: the exponential moving average and the queue of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import accumulate_dtype


@torch.no_grad()
def ema_update_(
    targets: Tensor | Sequence[Tensor], sources: Tensor | Sequence[Tensor], momentum: float
) -> None:
    """Sets each target to target + (1 - momentum) * (source - target), one pair after the other.

    Tensors of integers or booleans are copied. Source: He 2020 (MoCo), eq. 2.

    Args:
        targets: tensors, modified.
        sources: as many tensors of the same shapes.
        momentum: in [0, 1]; 0 copies, 1 changes nothing.
    """
    several_targets = [targets] if isinstance(targets, Tensor) else targets
    several_sources = [sources] if isinstance(sources, Tensor) else sources
    for target, source in zip(several_targets, several_sources, strict=True):
        if not target.is_floating_point() or momentum == 0:
            target.copy_(source.clone())  # they may share memory
        elif momentum != 1:
            dtype = accumulate_dtype(target)
            t, s = target.to(dtype), source.to(dtype)
            target.copy_(t + (1 - momentum) * (s - t))


@torch.no_grad()
def queue_push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes the keys into the columns of a ring buffer and moves its pointer, in place.

    Key i goes to column (pointer + i) mod K; of more than K keys the last K are written. Source:
    He 2020 (MoCo), algorithm 1, for any batch size.

    Args:
        queue: `(D, K)`, modified.
        pointer: an int64 tensor of one element, the next column, modified; never read by the host.
        keys: `(N, D)`.
    """
    count, size = keys.shape[0], queue.shape[1]
    first = max(count - size, 0)
    columns = (pointer.reshape(()) + torch.arange(first, count, device=queue.device)) % size
    written = keys[first:].to(queue.dtype).mT.clone()  # keys may be columns of the queue
    queue.index_copy_(1, columns, written)
    pointer.add_(count).remainder_(size)
