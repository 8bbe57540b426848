"""The products around an output head: which rows live, and the gradients from tiles of logits.

Everything here takes the number of live rows from the device: no tile of masked rows multiplies
anything, and the host waits for nothing. Accumulation is float32 in registers; a weight's
gradient is written once, by the one program that has summed over all rows.
"""

import triton
import triton.language as tl

from apt_kernels.triton.head.logits import grouped, live_rows

LENGTHS = ["N", "V", "row_begin", "row_end", "column_begin", "split_blocks"]


# What: the list of the rows whose mask is true, in order, and its length.
# Passes: one. Bytes: N read, 4 N written. Parallelism: one program. Accuracy: exact.
@triton.jit(do_not_specialize=["N"])
def live_rows_kernel(mask_ptr, rows_ptr, count_ptr, N: tl.int32, BLOCK: tl.constexpr):
    found = N * 0
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts = tl.load(mask_ptr + row, mask=row < N, other=0).to(tl.int32)
        before = tl.cumsum(counts, 0) - counts
        tl.store(rows_ptr + found + before, row, mask=counts != 0)
        found += tl.sum(counts, 0)
    tl.store(count_ptr, found)


# What: (rows, D) (+)= a tile of logit gradients (rows, columns) times the weight (columns, D).
# Passes: one product. Bytes: 4 D a row read and written for every tile but the first.
# Parallelism: (row tile, depth tile, part of the columns, each with sums of its own).
# Accuracy: float32.
@triton.jit(do_not_specialize=LENGTHS)
def grad_hidden_kernel(
    tile_ptr, weight_ptr, rows_ptr, count_ptr, factors_ptr, out_ptr,
    N: tl.int64, V: tl.int32, D, row_begin: tl.int32, row_end: tl.int32, column_begin: tl.int32,
    tile_stride, split_blocks: tl.int32, factors_stride,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, depth_tile = grouped(
        tl.program_id(0), tl.cdiv(row_end - row_begin, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP
    )
    first = row_begin + row_tile * BLOCK_M
    place, row, live, end = live_rows(rows_ptr, count_ptr, first, row_end, BLOCK_M)
    if first >= end:
        return
    d = depth_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    tile_ptrs = tile_ptr + (place - row_begin).to(tl.int64)[:, None] * tile_stride + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.program_id(1) * split_blocks * BLOCK_K
    stop = tl.minimum(begin + split_blocks * BLOCK_K, tile_stride)
    for start in range(begin, stop, BLOCK_K):
        column = column_begin + start + k
        weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * D + d[None, :]
        grad = tl.load(tile_ptrs + start, mask=live[:, None], other=0.0)
        w = tl.load(weight_ptrs, mask=(column < V)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(grad, w, total, input_precision=PRECISION)
    if factors_ptr is not None:
        total *= tl.load(factors_ptr + row * factors_stride, mask=live, other=1.0)[:, None]
    out_ptrs = out_ptr + (tl.program_id(1) * N + row)[:, None] * D + d[None, :]
    written = live[:, None] & (d < D)[None, :]
    if ADD:
        total += tl.load(out_ptrs, mask=written, other=0.0)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=written)


# What: rows of grad_weight = a tile of logit gradients, transposed, times the hidden states.
# Passes: one product over all live rows. Bytes: every element written once.
# Parallelism: (column tile, depth tile). Accuracy: float32, rounded once.
@triton.jit(do_not_specialize=LENGTHS)
def grad_weight_kernel(
    tile_ptr, hidden_ptr, rows_ptr, count_ptr, relative_ptr, factor_ptr, out_ptr,
    N: tl.int32, V: tl.int32, D, column_begin: tl.int32, tile_stride,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    column_tile, depth_tile = grouped(
        tl.program_id(0), tile_stride // BLOCK_V, tl.cdiv(D, BLOCK_D), GROUP
    )
    in_tile = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    d = depth_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    end = N
    if count_ptr is not None:
        end = tl.load(count_ptr)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_K):
        place, row, live, _ = live_rows(rows_ptr, count_ptr, start, N, BLOCK_K)
        tile_ptrs = tile_ptr + place.to(tl.int64)[:, None] * tile_stride + in_tile[None, :]
        grad = tl.load(tile_ptrs, mask=live[:, None], other=0.0)
        hidden_ptrs = hidden_ptr + row[:, None] * D + d[None, :]
        h = tl.load(hidden_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0)
        if relative_ptr is not None:  # the hidden states have more digits to lose than the grad
            relative = tl.load(relative_ptr + row, mask=live, other=0.0)[:, None]
            h = (h * relative).to(hidden_ptr.dtype.element_ty)
        total = tl.dot(tl.trans(grad), h, total, input_precision=PRECISION)
    if factor_ptr is not None:
        total *= tl.load(factor_ptr)
    column = column_begin + in_tile
    out_ptrs = out_ptr + column.to(tl.int64)[:, None] * D + d[None, :]
    written = (column < V)[:, None] & (d < D)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=written)


# What: grad_bias (+)= the sums of the columns of a tile, from one partial sum a row tile.
# Passes: one. Bytes: 4 a partial sum read. Parallelism: blocks of columns. Accuracy: float32.
@triton.jit(do_not_specialize=LENGTHS)
def grad_bias_kernel(
    column_sums_ptr, count_ptr, factor_ptr, out_ptr,
    V: tl.int32, row_begin: tl.int32, row_end: tl.int32, column_begin: tl.int32, tile_stride,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    in_tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = column_begin + in_tile
    written = (in_tile < tile_stride) & (column < V)
    end = row_end
    if count_ptr is not None:
        end = tl.minimum(tl.load(count_ptr), row_end)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, tl.cdiv(end - row_begin, BLOCK_M)):
        sums_ptr = column_sums_ptr + tile * tile_stride.to(tl.int64)
        total += tl.load(sums_ptr + in_tile, mask=in_tile < tile_stride, other=0.0)
    if factor_ptr is not None:
        total *= tl.load(factor_ptr)
    if ADD:
        total += tl.load(out_ptr + column, mask=written, other=0.0)
    tl.store(out_ptr + column, total, mask=written)
