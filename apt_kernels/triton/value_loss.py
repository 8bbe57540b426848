"""value_loss in Triton: loss, metrics and gradient; a tile of a row in each program."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows
from apt_kernels.triton.tokens import (
    BLOCK,
    ROWS_BLOCK,
    WARPS,
    count_rows,
    read,
    row_scale,
    row_strides,
    sum_partials,
)


# What: the first return that counts, from which the returns are measured: the squares of equal ones
# are 0. Passes: one over the lengths and the mask of one row. One program.
@triton.jit(do_not_specialize=["B", "T", "returns_b", "mask_b"])
def _pivot_kernel(
    returns_ptr, mask_ptr, lengths_ptr, pivot_ptr, B: tl.int64, T: tl.int64, returns_b: tl.int64,
    mask_b: tl.int64, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T *= UNIT
    row = B
    for start in range(0, B, BLOCK):
        i = start + tl.arange(0, BLOCK)
        full = tl.load(lengths_ptr + i, mask=i < B, other=0) > 0
        row = tl.minimum(row, tl.min(tl.where(full, i, B), 0))
    first = T
    for begin in range(0, T, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = (t < T) & (row < B)
        counts = tl.load(mask_ptr + row * mask_b * UNIT + t, mask=inside, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(counts, t, T), 0))
    pivot = tl.load(returns_ptr + row * returns_b * UNIT + first, mask=first < T, other=0.0)
    tl.store(pivot_ptr, pivot.to(tl.float32))


# What: the sums of R - pivot and of R - v of a tile of tokens.
# Passes: one. Bytes: returns, values and mask read. Parallelism: a tile of a row a program.
@triton.jit(do_not_specialize=["B", "T", "values_b", "returns_b", "mask_b"])
def _means_kernel(
    values_ptr, returns_ptr, mask_ptr, pivot_ptr, partials_ptr, B: tl.int64, T: tl.int64,
    values_b: tl.int64, returns_b: tl.int64, mask_b: tl.int64,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT
    start = tl.program_id(1).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < T - start
    place = row * tl.num_programs(1) + tl.program_id(1)
    counts = read(mask_ptr, row, mask_b, start, live, live, 1, UNIT) != 0
    value = read(values_ptr, row, values_b, start, live, counts, 1, UNIT)
    target = read(returns_ptr, row, returns_b, start, live, counts, 1, UNIT)
    from_pivot = tl.where(counts, target - tl.load(pivot_ptr), 0.0)
    tl.store(partials_ptr + place, tl.sum(from_pivot, 0))
    tl.store(partials_ptr + B * tl.num_programs(1) + place, tl.sum(target - value, 0))


# What: the losses of a tile of tokens, their gradient, clipped tokens and centred squares.
# Passes: one, after one over the mask and one for the means. Bytes: each input once, the gradient
# written. Parallelism: a tile of a row a program. Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["B", "T", "values_b", "returns_b", "mask_b", "old_b"])
def _value_loss_fwd_kernel(
    values_ptr, returns_ptr, mask_ptr, old_ptr, normalizer_ptr, lengths_ptr, pivot_ptr, means_ptr,
    partials_ptr, grad_values_ptr, B: tl.int64, T: tl.int64,
    values_b: tl.int64, returns_b: tl.int64, mask_b: tl.int64, old_b: tl.int64,
    clip_range: tl.float32, AGGREGATION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT
    start = tl.program_id(1).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < T - start
    P = B * tl.num_programs(1)
    place = row * tl.num_programs(1) + tl.program_id(1)
    scale, _ = row_scale(lengths_ptr, normalizer_ptr, row, B, T, AGGREGATION, ROWS)
    counts = read(mask_ptr, row, mask_b, start, live, live, 1, UNIT) != 0
    value = read(values_ptr, row, values_b, start, live, counts, 1, UNIT)
    target = read(returns_ptr, row, returns_b, start, live, counts, 1, UNIT)
    error = value - target
    squared = error * error
    grad = error
    clipped = error * 0.0
    if old_ptr is not None:
        old = read(old_ptr, row, old_b, start, live, counts, 1, UNIT)
        low = old - clip_range
        high = old + clip_range
        distance = tl.where(value < low, low, tl.where(value > high, high, value)) - target
        worse = distance * distance > squared
        squared = tl.where(worse, distance * distance, squared)
        grad = tl.where(worse, 0.0, error)
        clipped = tl.where(worse, 1.0, 0.0)
    tl.store(
        grad_values_ptr + (row * T + start) + i, tl.where(counts, grad * scale, 0.0), mask=live
    )
    from_mean = tl.where(counts, target - tl.load(pivot_ptr) - tl.load(means_ptr), 0.0)
    unexplained = tl.where(counts, -error - tl.load(means_ptr + 1), 0.0)
    tl.store(partials_ptr + place, tl.sum(0.5 * squared * scale, 0))
    tl.store(partials_ptr + P + place, tl.sum(clipped, 0))
    tl.store(partials_ptr + 2 * P + place, tl.sum(from_mean * from_mean, 0))
    tl.store(partials_ptr + 3 * P + place, tl.sum(unexplained * unexplained, 0))


# What: loss, clip_fraction and explained_variance from the four sums. One program.
@triton.jit
def _finish_kernel(sums_ptr, loss_ptr, metrics_ptr):
    spread = tl.load(sums_ptr + 2)
    share = tl.load(sums_ptr + 3) / tl.where(spread > 0, spread, 1.0)
    tl.store(loss_ptr, tl.load(sums_ptr))
    tl.store(metrics_ptr, tl.load(sums_ptr + 1))
    tl.store(metrics_ptr + 1, tl.where(spread > 0, 1.0 - share, 0.0))


def value_loss_fwd(values, returns, mask, old_values, normalizer, aggregation, clip_range):
    """(loss 0-dim, metrics (2,), grad_values (B,T)), all float32."""
    B, T = values.shape
    grad_values = values.new_empty((B, T), dtype=torch.float32)
    if B == 0 or T == 0:
        loss = values.new_zeros((), dtype=torch.float32)
        return loss, values.new_zeros(2, dtype=torch.float32), grad_values
    loss, metrics = grad_values.new_empty(()), grad_values.new_empty(2)
    lengths, _ = count_rows(mask)
    tiles = triton.cdiv(T, BLOCK)
    partials = grad_values.new_empty((2, B * tiles)), grad_values.new_empty((4, B * tiles))
    inputs = (values, returns, mask)
    unit, strides = row_strides(T, *inputs, old_values)
    sizes = {"UNIT": unit, "BLOCK": BLOCK, "num_warps": WARPS}
    pivot = grad_values.new_empty(())
    with rows.device_of(values):
        _pivot_kernel[(1,)](
            returns,
            mask,
            lengths,
            pivot,
            B,
            T // unit,
            *strides[1:3],
            **{**sizes, "BLOCK": ROWS_BLOCK},
        )
        _means_kernel[(B, tiles)](*inputs, pivot, partials[0], B, T // unit, *strides[:3], **sizes)
        means = sum_partials(partials[0], lengths, 0b11)
        _value_loss_fwd_kernel[(B, tiles)](
            *inputs, old_values, normalizer, lengths, pivot, means, partials[1], grad_values, B,
            T // unit, *strides, clip_range, AGGREGATION=aggregation, ROWS=ROWS_BLOCK, **sizes,
        )  # fmt: skip
        _finish_kernel[(1,)](sum_partials(partials[1], lengths, 0b0010), loss, metrics, num_warps=1)
    return loss, metrics, grad_values
