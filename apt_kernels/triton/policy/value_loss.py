"""value_loss in Triton: loss, metrics and gradient; a tile of a row in each program."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.token_windows import (
    BLOCK,
    ROWS_BLOCK,
    WARPS,
    column,
    finish,
    live_flags,
    put,
    read,
    row_layout,
    tiles_of,
    window,
    write,
)

NUMBER = 2  # of tokens, after the loss and the clipped tokens
WIDTH = 8  # of a tile's sums


@triton.jit
def _spread(x, counts, number):
    """The mean of the x that count, and the sum of the squares around it: 0 of equal ones."""
    pivot = tl.max(tl.where(counts, x, float("-inf")), 0)
    from_pivot = tl.where(counts, x - pivot, 0.0)
    mean = tl.sum(from_pivot, 0) / tl.maximum(number, 1.0)
    centred = tl.where(counts, from_pivot - mean, 0.0)
    return pivot.to(tl.float64) + mean, tl.sum(centred * centred, 0)


# What: losses of a tile of tokens, the gradient of their sum, clipped tokens, and means and centred
# squares of returns and of what values lack of them. Passes: one. Bytes: each input once, the
# gradient written. Parallelism: a tile of a row a program. Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["B", "T", "values_b", "returns_b", "mask_b", "old_values_b"])
def _value_loss_fwd_kernel(
    values_ptr, returns_ptr, mask_ptr, old_values_ptr, sums_ptr, grad_values_ptr,
    B: tl.int64, T: tl.int64,
    values_b: tl.int64, returns_b: tl.int64, mask_b: tl.int64, old_values_b: tl.int64,
    clip_range: tl.float32, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT if UNIT else 1
    tokens = window(row, tl.program_id(1).to(tl.int64), B, T, UNIT, BLOCK)
    counts = live_flags(mask_ptr, mask_b, tokens, UNIT)
    value = read(values_ptr, values_b, tokens, counts, 1, UNIT)
    target = read(returns_ptr, returns_b, tokens, counts, 1, UNIT)
    error = value - target
    squared = error * error
    grad = error
    clipped = error * 0.0
    if old_values_ptr is not None:
        old = read(old_values_ptr, old_values_b, tokens, counts, 1, UNIT)
        low = old - clip_range
        high = old + clip_range
        distance = tl.where(value < low, low, tl.where(value > high, high, value)) - target
        worse = distance * distance > squared
        squared = tl.where(worse, distance * distance, squared)
        grad = tl.where(worse, 0.0, error)
        clipped = tl.where(worse, 1.0, 0.0)
    grad = tl.where(counts, grad, 0.0)
    write(grad_values_ptr, T, tokens, grad, UNIT)
    number = tl.sum(counts.to(tl.float32), 0)
    mean, squares = _spread(target, counts, number)
    mean_error, squares_error = _spread(-error, counts, number)
    sums = put(tl.zeros((WIDTH,), tl.float64), 0, tl.sum(0.5 * squared, 0))
    sums = put(sums, 1, tl.sum(clipped, 0))
    sums = put(sums, 2, number)
    sums = put(sums, 3, mean)
    sums = put(sums, 4, squares)
    sums = put(sums, 5, mean_error)
    sums = put(sums, 6, squares_error)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + place * WIDTH + tl.arange(0, WIDTH), sums)


# What: the explained variance from the sums of tiles. Passes: one, for squares around the largest
# mean of the first tiles that have tokens. One program. Accuracy: float64; exactly 0 of equal
# returns.
@triton.jit(do_not_specialize=["P"])
def _explained_variance_kernel(
    sums_ptr, out_ptr, P: tl.int64, WIDTH: tl.constexpr, TILES: tl.constexpr
):
    tile = tl.arange(0, TILES)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    pivot = tl.full((WIDTH,), float("-inf"), tl.float64)
    count = tl.zeros((TILES,), tl.float64)
    within = tl.zeros((TILES, WIDTH), tl.float64)
    total = tl.zeros((TILES, WIDTH), tl.float64)
    squares = tl.zeros((TILES, WIDTH), tl.float64)
    for start in range(0, P, TILES):
        at = start + tile
        x = tl.load(sums_ptr + at * WIDTH + k, mask=at < P, other=0.0)
        n = column(x, k, 2)[:, None]
        largest = tl.max(tl.where(n > 0, x, float("-inf")), 0)
        pivot = tl.where(pivot == float("-inf"), largest, pivot)
        d = tl.where(n > 0, x - pivot[None, :], 0.0)
        within += tl.where(n > 0, x, 0.0)
        total += n * d
        squares += n * d * d
        count += tl.sum(n, 1)
    whole = tl.sum(total, 0)
    around = tl.sum(squares, 0) - whole * whole / tl.maximum(tl.sum(count, 0), 1.0)
    j = tl.arange(0, WIDTH)
    parts = tl.where((j == 3) | (j == 5), around, tl.sum(within, 0))
    spread = tl.sum(tl.where((j == 3) | (j == 4), parts, 0.0), 0)
    rest = tl.sum(tl.where((j == 5) | (j == 6), parts, 0.0), 0)
    share = rest / tl.where(spread > 0, spread, 1.0)
    tl.store(out_ptr, tl.where(spread > 0, 1.0 - share, 0.0))


def value_loss_fwd(values, returns, mask, old_values, normalizer, aggregation, clip_range):
    """(loss 0-dim, metrics (2,), grad_values (B,T), scales (B,1)), all float32.

    A row of the gradient is still to be multiplied by its scale.
    """
    B, T = values.shape
    grad_values = values.new_empty((B, T), dtype=torch.float32)
    if B == 0 or T == 0:
        loss = values.new_zeros((), dtype=torch.float32)
        return loss, loss.new_zeros(2), grad_values, loss.new_ones((B, 1))
    inputs = (values, returns, mask, old_values)
    unit, strides = row_layout(T, *inputs)
    tiles = tiles_of(T, unit)
    sums = grad_values.new_empty((B, tiles, WIDTH), dtype=torch.float64)
    metrics = grad_values.new_empty(2)
    with rows.device_of(values):
        _value_loss_fwd_kernel[(B, tiles)](
            *inputs, sums, grad_values, B, T // max(unit, 1), *strides, clip_range,
            UNIT=unit, BLOCK=BLOCK, WIDTH=WIDTH, num_warps=WARPS,
        )  # fmt: skip
        _explained_variance_kernel[(1,)](
            sums, metrics[1:], B * tiles, WIDTH=WIDTH, TILES=ROWS_BLOCK, num_warps=4
        )
    totals, scales = finish(sums, normalizer, aggregation, 0b01, NUMBER, T)
    metrics[0] = totals[1]
    return totals[0].clone(), metrics, grad_values, scales
