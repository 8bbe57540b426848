"""MoCo's queue of keys: a ring buffer written in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference

dispatch.define("queue_push_fwd(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys) -> ()")
dispatch.register("queue_push_", "queue_push_fwd")


class QueuePushCall(NamedTuple):
    """The arguments of the kernel."""

    queue: Tensor
    pointer: Tensor
    keys: Tensor


@torch.no_grad()
def queue_push_(
    queue: Tensor, pointer: Tensor, keys: Tensor, *, backend: str | None = None
) -> None:
    """Writes key i to column (pointer + i) % K of the queue and moves the pointer by N, in place.

    The batch need not divide the queue; of more than K keys the last K are written, where they
    would be if all were. The host never reads the pointer, so a GPU is not waited for. Only the
    new columns are touched; where the old queue is needed by a backward pass to come, PyTorch
    raises an error there. Source: He 2020 (MoCo), algorithm 1.

    Args:
        queue: `(D, K)` float32, bfloat16, float16 or float64, any strides, modified.
        pointer: int64 of one element, on the queue's device, modified.
        keys: `(N, D)` of any of these dtypes, any strides; no gradient. N = 0 changes nothing. Keys
            that are columns of the queue are read before it is written.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("queue", queue)
    checks.dims("queue", queue, 2)
    if queue.shape[1] == 0:
        raise ValueError(f"queue: expected shape (D, K), K >= 1, got {tuple(queue.shape)}")
    if not queue.is_contiguous():
        checks.no_shared_elements("queue", queue)
    checks.tensor("pointer", pointer, (torch.int64,))
    if pointer.numel() != 1:
        raise ValueError(f"pointer: expected one element, got shape {tuple(pointer.shape)}")
    checks.same_device("pointer", pointer, "queue", queue)
    checks.tensor("keys", keys)
    checks.dims("keys", keys, 2)
    checks.shape("keys", keys, (keys.shape[0], queue.shape[0]), "a row a key, as long as a column")
    checks.same_device("keys", keys, "queue", queue)
    backend = dispatch.choose("queue_push_", queue.device, backend)
    if backend == "reference":
        reference.queue_push_(queue, pointer, keys)
    else:
        call = QueuePushCall(queue=queue, pointer=pointer, keys=keys)
        dispatch.kernel("queue_push_fwd", backend)(*call)
        dispatch.written((queue, pointer))


@dispatch.fake("queue_push_fwd")
def _(*fields):
    return None
