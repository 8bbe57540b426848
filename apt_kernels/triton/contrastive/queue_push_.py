"""queue_push_ in Triton: the pointer stays on the device."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

KEYS, FEATURES = 32, 32  # of a tile, which is turned around in registers
WARPS = 2  # each of them asks for the pointer: a sector beside the 2 KiB of its share of a tile


# What: key i to column (pointer + i) mod K. Passes: one. Bytes: each key read and written once.
# Parallelism: one program a tile of keys and features; loads run along features, stores along
# columns, of which a tile takes those from one multiple of KEYS to the next, wherever the pointer
# is: whole sectors, and vectors inside. Accuracy: a copy, or one rounding to the queue's dtype.
@triton.jit(do_not_specialize=["oldest", "N"])
def _queue_push_fwd_kernel(
    queue_ptr, pointer_ptr, keys_ptr, oldest: tl.int64, N: tl.int64, D, K,
    queue_stride_d, queue_stride_k, keys_stride_n, keys_stride_d,
    KEYS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    pointer = (tl.load(pointer_ptr) % K + K) % K  # a remainder may be below 0
    window = (pointer + oldest) // KEYS + tl.program_id(0)
    place = window * KEYS + tl.arange(0, KEYS)
    i = place - pointer
    d = tl.program_id(1).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    live = (i >= oldest) & (i < N)
    at = keys_ptr + i[:, None] * keys_stride_n + d[None, :] * keys_stride_d
    keys = tl.load(at, mask=live[:, None] & (d[None, :] < D))
    keys = tl.trans(keys).to(queue_ptr.dtype.element_ty)
    rows = queue_ptr + d[:, None] * queue_stride_d
    first = window * KEYS - pointer
    if (first >= oldest) & (first + KEYS <= N):
        tl.store(rows + (place % K)[None, :] * queue_stride_k, keys, mask=d[:, None] < D)
    else:  # in a form that shows no multiple: lanes then lie along columns, a number each
        place = (i % K + pointer) % K
        mask = (d[:, None] < D) & live[None, :]
        tl.store(rows + place[None, :] * queue_stride_k, keys, mask=mask)


# A launch of its own: programs of the first one may read the pointer after others have ended.
@triton.jit(do_not_specialize=["N"])
def _advance_kernel(pointer_ptr, N: tl.int64, K):
    tl.store(pointer_ptr, ((tl.load(pointer_ptr) + N) % K + K) % K)


def queue_push_fwd(queue, pointer, keys):
    """Writes the keys into the queue's columns and moves the pointer."""
    (D, K), N = queue.shape, keys.shape[0]
    oldest = max(0, N - K)
    if keys.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr():
        keys = keys.clone()  # they are columns of the queue
    with rows.device_of(queue):
        if N > 0 and D > 0:
            # a window more, for the first one may begin before the pointer
            grid = (triton.cdiv(N - oldest, KEYS) + 1, triton.cdiv(D, FEATURES))
            _queue_push_fwd_kernel[grid](
                queue, pointer, keys, oldest, N, D, K, *queue.stride(), *keys.stride(),
                KEYS=KEYS, FEATURES=FEATURES, num_warps=WARPS,
            )  # fmt: skip
        _advance_kernel[(1,)](pointer, N, K, num_warps=1)
    torch.autograd.graph.increment_version((queue, pointer))
