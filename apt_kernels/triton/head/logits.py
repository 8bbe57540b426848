"""The logits of an output head, tile by tile: their statistics, and their gradients.

Products: `head_statistics_kernel` does N D V multiply-adds, `grad_logits_tile_kernel` as many again
for the columns of its tile unless it is given the logits. N counts the rows that live: the tiles of
masked rows, whose number only the device knows, end before their first load.
"""

import triton
import triton.language as tl

from apt_kernels.triton.common.rows import reciprocal, scaled_logit

LENGTHS = ["V", "row_begin", "row_end", "splits", "split_tiles", "column_begin"]


@triton.jit
def grouped(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP rows of tiles after one another, each column by column."""
    in_group = GROUP * column_tiles
    first = program // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def live_rows(rows_ptr, count_ptr, first, row_end, BLOCK_M: tl.constexpr):
    """Places first ... of the list of live rows, the rows there, and which places count."""
    end = row_end
    if count_ptr is not None:
        end = tl.minimum(tl.load(count_ptr), row_end)
    place = first + tl.arange(0, BLOCK_M)
    live = place < end
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=live, other=0)
    return place, row.to(tl.int64), live, end


@triton.jit
def _logit_tile(
    hidden_ptr, weight_ptr, bias_ptr, row, live, column, V, D, logit_scale,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logit_scale (hidden weight^T + bias) at the given rows and columns, in float32."""
    inside = column < V
    d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + row[:, None] * D + d[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * D + d[None, :]
    x = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        in_depth = (start + d < D)[None, :]
        h = tl.load(hidden_ptrs + start, mask=live[:, None] & in_depth, other=0.0)
        w = tl.load(weight_ptrs + start, mask=inside[:, None] & in_depth, other=0.0)
        x = tl.dot(h, tl.trans(w), x, input_precision=PRECISION)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x * logit_scale


@triton.jit
def _row_reciprocal(temperatures_ptr, temperature, row, live, BLOCK_M: tl.constexpr):
    t = tl.full([BLOCK_M], 1.0, tl.float32) * temperature
    if temperatures_ptr is not None:
        t = tl.load(temperatures_ptr + row, mask=live, other=1.0).to(tl.float32)
    return reciprocal(t)


# What: of every live row and every part of the columns the maximum, the sum of e^(z-maximum) and,
# as asked, the entropy's sum, the sum of z and the largest logit; z at the row's token; and, as
# asked, the logits themselves. Passes: one product N D V. Bytes: hidden and weight once a group.
# Parallelism: (row tile, part of the columns). Accuracy: float32 accumulation.
@triton.jit(do_not_specialize=LENGTHS)
def head_statistics_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, temperatures_ptr, rows_ptr, count_ptr,
    partials_ptr, best_ptr, token_z_ptr, logits_ptr,
    V: tl.int32, D, row_begin: tl.int32, row_end: tl.int32, splits: tl.int32,
    split_tiles: tl.int32, logits_stride,
    temperature: tl.float32, softcap: tl.float32, logit_scale: tl.float32,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, split = grouped(tl.program_id(0), tl.cdiv(row_end - row_begin, BLOCK_M), splits, GROUP)
    first = row_begin + tile * BLOCK_M
    place, row, live, end = live_rows(rows_ptr, count_ptr, first, row_end, BLOCK_M)
    if first >= end:
        return
    inverse, rest = _row_reciprocal(temperatures_ptr, temperature, row, live, BLOCK_M)
    token = tl.load(ids_ptr + row, mask=live, other=-1)
    at = place - row_begin
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    best = tl.zeros([BLOCK_M], tl.int32)
    begin = split * split_tiles * BLOCK_V
    for start in range(begin, tl.minimum(begin + split_tiles * BLOCK_V, V), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = (column < V)[None, :]
        x = _logit_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, live, column, V, D, logit_scale,
            BLOCK_M, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        if logits_ptr is not None:
            logits_ptrs = logits_ptr + at.to(tl.int64)[:, None] * logits_stride + column[None, :]
            tl.store(logits_ptrs, x, mask=live[:, None])
        z = scaled_logit(x, inverse[:, None], rest[:, None], softcap, SCALED, CAPPED)[0]
        if EXTRA == 2:
            u += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, -float("inf"))
        new_m = tl.maximum(m, tl.max(z, 1))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        e = tl.exp(z - shift[:, None])
        old = tl.exp(m - shift)
        if EXTRA == 1:
            moved = tl.where(s > 0, s * (m - shift), 0.0)
            terms = tl.where(e > 0, e * (z - shift[:, None]), 0.0)
            u = (u + moved) * old + tl.sum(terms, 1)
        s = s * old + tl.sum(e, 1)
        m = new_m
        if best_ptr is not None:
            tile_top, index = tl.max(tl.where(inside, x, -float("inf")), 1, return_indices=True)
            best = tl.where(tile_top > top, start + index, best)
            top = tl.maximum(top, tile_top)
        here = (token >= start) & (token < tl.minimum(start + BLOCK_V, V))
        chosen = tl.where(column[None, :] == token[:, None], z, 0.0)
        tl.store(token_z_ptr + at, tl.sum(chosen, 1), mask=live & here)
    rows = (row_end - row_begin).to(tl.int64)
    slot = partials_ptr + split * rows + at
    tl.store(slot, m, mask=live)
    tl.store(slot + splits * rows, s, mask=live)
    if EXTRA > 0:
        tl.store(slot + 2 * splits * rows, u, mask=live)
    if best_ptr is not None:
        tl.store(slot + 3 * splits * rows, top, mask=live)
        tl.store(best_ptr + split * rows + at, best, mask=live)


@triton.jit
def merged_statistics(partials_ptr, at, live, rows, splits, EXTRA: tl.constexpr):
    """The maximum, the sum and the extra sum of whole rows, merged from the parts of columns."""
    slot = partials_ptr + at
    plane = splits * rows  # rows is a 64-bit integer
    m = tl.load(slot, mask=live, other=0.0)
    s = tl.load(slot + plane, mask=live, other=1.0)
    u = tl.zeros_like(m)
    if EXTRA > 0:
        u = tl.load(slot + 2 * plane, mask=live, other=0.0)
    for split in range(1, splits):
        part = slot + split * rows
        part_m = tl.load(part, mask=live, other=0.0)
        part_s = tl.load(part + plane, mask=live, other=0.0)
        new_m = tl.maximum(m, part_m)
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        old = tl.exp(m - shift)
        new = tl.exp(part_m - shift)
        if EXTRA > 0:
            part_u = tl.load(part + 2 * plane, mask=live, other=0.0)
            if EXTRA == 1:
                u = (u + tl.where(s > 0, s * (m - shift), 0.0)) * old
                u += (part_u + tl.where(part_s > 0, part_s * (part_m - shift), 0.0)) * new
            else:
                u += part_u
        s = s * old + part_s * new
        m = new_m
    return m, s, u


# What: the gradient of a tile of logits, g ((1-a) [v=token] + a/V - p) - ge p (log p + entropy)
# with a = smoothing, rounded to the dtype of the products that follow; columns past V get 0.
# Passes: one product N D (columns of the tile), none if the logits were stored.
# Parallelism: (row tile, column tile). Accuracy: float32 until the store.
@triton.jit(do_not_specialize=LENGTHS)
def grad_logits_tile_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, temperatures_ptr, rows_ptr, count_ptr, logits_ptr,
    lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr, relative_ptr, tile_ptr, column_sums_ptr,
    V: tl.int32, D, row_begin: tl.int32, row_end: tl.int32, column_begin: tl.int32,
    tile_stride, grad_stride, temperature: tl.float32, softcap: tl.float32,
    logit_scale: tl.float32, smoothing: tl.float32,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = grouped(
        tl.program_id(0), tl.cdiv(row_end - row_begin, BLOCK_M), tile_stride // BLOCK_V, GROUP
    )
    first = row_begin + row_tile * BLOCK_M
    place, row, live, end = live_rows(rows_ptr, count_ptr, first, row_end, BLOCK_M)
    if first >= end:
        return
    at = (place - row_begin).to(tl.int64)[:, None]
    in_tile = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = column_begin + in_tile
    if logits_ptr is None:
        x = _logit_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, live, column, V, D, logit_scale,
            BLOCK_M, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        x = tl.load(logits_ptr + at * tile_stride + in_tile[None, :], mask=live[:, None], other=0.0)
    inverse, rest = _row_reciprocal(temperatures_ptr, temperature, row, live, BLOCK_M)
    z, slope = scaled_logit(x, inverse[:, None], rest[:, None], softcap, SCALED, CAPPED)
    m = tl.load(lse_ptr + row * 2, mask=live, other=0.0)[:, None]
    log_s = tl.load(lse_ptr + row * 2 + 1, mask=live, other=0.0)[:, None]
    logp = z - m - log_s
    p = tl.exp(logp)
    g = tl.load(grad_ptr + row * grad_stride, mask=live, other=0.0)[:, None]
    token = tl.load(ids_ptr + row, mask=live, other=-1)[:, None]
    g = tl.where((token >= 0) & (token < V), g, 0.0)
    weight = g
    if grad_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)[:, None]
        weight += tl.load(grad_entropy_ptr + row, mask=live, other=0.0)[:, None] * (logp + entropy)
    chosen = tl.where(column[None, :] == token, 1.0 - smoothing, 0.0)
    grad = tl.where(p == 0, 0.0, -p * weight) + g * (chosen + smoothing / V)
    grad = tl.where((column < V)[None, :], grad * slope * logit_scale, 0.0)
    tile_ptrs = tile_ptr + at * tile_stride + in_tile[None, :]
    tl.store(tile_ptrs, grad.to(tile_ptr.dtype.element_ty), mask=live[:, None])
    if column_sums_ptr is not None:
        if relative_ptr is not None:
            grad *= tl.load(relative_ptr + row, mask=live, other=0.0)[:, None]
        sums = tl.sum(tl.where(live[:, None], grad, 0.0), 0)
        tl.store(column_sums_ptr + row_tile.to(tl.int64) * tile_stride + in_tile, sums)
