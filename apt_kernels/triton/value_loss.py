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
    row_layout,
    row_scale,
    sum_partials,
    tiles_of,
    window,
    write,
)


@triton.jit
def _put_spread(partials_ptr, P, place, x, counts, number):
    """The mean of the x that count, and the sum of the squares around it: 0 of equal ones."""
    pivot = tl.max(tl.where(counts, x, float("-inf")), 0)
    from_pivot = tl.where(counts, x - pivot, 0.0)
    mean = tl.sum(from_pivot, 0) / tl.maximum(number, 1.0)
    centred = tl.where(counts, from_pivot - mean, 0.0)
    tl.store(partials_ptr + place, pivot.to(tl.float64) + mean)
    tl.store(partials_ptr + P + place, tl.sum(centred * centred, 0))


# What: losses of a tile of tokens, their gradient, clipped tokens, and means and centred squares of
# returns and of what values lack of them. Passes: one, after one over the mask. Bytes: each
# input once, the gradient written. Parallelism: a tile of a row a program. Accuracy: float32, fixed
# order.
@triton.jit(do_not_specialize=["B", "T", "values_b", "returns_b", "mask_b", "old_b"])
def _value_loss_fwd_kernel(
    values_ptr, returns_ptr, mask_ptr, old_ptr, normalizer_ptr, lengths_ptr, totals_ptr,
    partials_ptr, tiles_ptr, grad_values_ptr, B: tl.int64, T: tl.int64,
    values_b: tl.int64, returns_b: tl.int64, mask_b: tl.int64, old_b: tl.int64,
    clip_range: tl.float32, AGGREGATION: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT if UNIT else 1
    tile = tl.program_id(1).to(tl.int64)
    start, head, end, live, vectors, rest = window(row, tile, B, T, UNIT, BLOCK)
    P = B * tl.num_programs(1)
    place = row * tl.num_programs(1) + tl.program_id(1)
    scale, _ = row_scale(lengths_ptr, totals_ptr, normalizer_ptr, row, B, T, AGGREGATION, ROWS)
    counts = read(mask_ptr, row, mask_b, start, live, vectors, rest, live, 1, UNIT) != 0
    value = read(values_ptr, row, values_b, start, live, vectors, rest, counts, 1, UNIT)
    target = read(returns_ptr, row, returns_b, start, live, vectors, rest, counts, 1, UNIT)
    error = value - target
    squared = error * error
    grad = error
    clipped = error * 0.0
    if old_ptr is not None:
        old = read(old_ptr, row, old_b, start, live, vectors, rest, counts, 1, UNIT)
        low = old - clip_range
        high = old + clip_range
        distance = tl.where(value < low, low, tl.where(value > high, high, value)) - target
        worse = distance * distance > squared
        squared = tl.where(worse, distance * distance, squared)
        grad = tl.where(worse, 0.0, error)
        clipped = tl.where(worse, 1.0, 0.0)
    grad = tl.where(counts, grad * scale, 0.0)
    write(grad_values_ptr, row, T, start, head, end, live, grad, UNIT)
    tl.store(partials_ptr + place, tl.sum(0.5 * squared * scale, 0))
    tl.store(partials_ptr + P + place, tl.sum(clipped, 0))
    number = tl.sum(counts.to(tl.float32), 0)
    tl.store(tiles_ptr + place, number)
    _put_spread(tiles_ptr + P, P, place, target, counts, number)
    _put_spread(tiles_ptr + 3 * P, P, place, -error, counts, number)


# What: the sum of squares around the mean of all, of returns and of what values lack of them, from
# the means and sums of tiles. Passes: two over those. Parallelism: one of the two a program.
# Accuracy: float64; exactly 0 where all are equal.
@triton.jit(do_not_specialize=["P"])
def _join_spreads_kernel(tiles_ptr, spreads_ptr, P: tl.int64, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    means_ptr = tiles_ptr + (1 + 2 * k) * P
    top = tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(0, P, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number = tl.load(tiles_ptr + i, mask=i < P, other=0.0)
        mean = tl.load(means_ptr + i, mask=i < P, other=0.0)
        top = tl.maximum(top, tl.where(number > 0, mean, float("-inf")))
    pivot = tl.max(top, 0)
    within = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, P, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        n = tl.load(tiles_ptr + j, mask=j < P, other=0.0)
        full = n > 0
        d = tl.where(full, tl.load(means_ptr + j, mask=full, other=0.0) - pivot, 0.0)
        within += tl.load(means_ptr + P + j, mask=full, other=0.0)
        count += n
        total += n * d
        squares += n * d * d
    whole = tl.sum(total, 0)
    between = tl.sum(squares, 0) - whole * whole / tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(spreads_ptr + k, tl.sum(within, 0) + between)


# What: loss, clip_fraction and explained_variance from the sums. One program.
@triton.jit
def _finish_kernel(sums_ptr, spreads_ptr, loss_ptr, metrics_ptr):
    spread = tl.load(spreads_ptr)
    share = tl.load(spreads_ptr + 1) / tl.where(spread > 0, spread, 1.0)
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
    lengths, totals, _ = count_rows(mask)
    inputs = (values, returns, mask, old_values)
    unit, strides = row_layout(T, *inputs)
    tiles = tiles_of(T, unit)
    partials = grad_values.new_empty((2, B * tiles))
    of_tiles = grad_values.new_empty((5, B * tiles), dtype=torch.float64)
    spreads = of_tiles.new_empty(2)
    with rows.device_of(values):
        _value_loss_fwd_kernel[(B, tiles)](
            *inputs, normalizer, lengths, totals, partials, of_tiles, grad_values,
            B, T // max(unit, 1), *strides, clip_range,
            AGGREGATION=aggregation, UNIT=unit, BLOCK=BLOCK, ROWS=ROWS_BLOCK, num_warps=WARPS,
        )  # fmt: skip
        _join_spreads_kernel[(2,)](of_tiles, spreads, B * tiles, BLOCK=ROWS_BLOCK, num_warps=4)
        sums = sum_partials(partials, lengths, totals, 0b10)
        _finish_kernel[(1,)](sums, spreads, loss, metrics, num_warps=1)
    return loss, metrics, grad_values
