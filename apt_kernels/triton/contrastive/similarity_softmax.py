"""Softmax statistics of all similarities, each pair multiplied once for both of its rows.

A program takes a block of rows and some of the tiles beside it. What it sums over its own rows
stays in registers; what a tile adds to its columns is written apart, a slot for every tile of a
column, and folded in by a second kernel: no atomics, the same order every time. Slots are reused
in waves, so the memory is O(N), not a share of the similarities.
"""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.contrastive.similarity import (
    INFINITY,
    LENGTHS,
    at_offset,
    factors,
    precision,
    products,
    scale_of,
    scaled,
    tiles,
)

SLOTS = 64  # tiles of a column in a wave
PROGRAMS = 512  # enough for several waves on every GPU
MERGE_BLOCK = 128
# Planes of the statistics of a row: max d, sum of e^(s - max s), that sum weighted with d - max d;
# with labels also the best positive, the best negative, the sum and the number of positives.
SOFTMAX_PLANES, LABEL_PLANES = 3, 7


@triton.jit
def _softmax(d, scale, AXIS: tl.constexpr, SLOPES: tl.constexpr):
    """(max, sum, weighted sum) of a tile along an axis."""
    m = tl.max(d, AXIS)
    shift = tl.where(m == -INFINITY, 0.0, m)
    x = d - (shift[:, None] if AXIS == 1 else shift[None, :])
    e = tl.exp(x * scale)
    weighted = tl.zeros_like(m)
    if SLOPES:
        weighted = tl.sum(tl.where(e > 0, e * x, 0.0), AXIS)
    return m, tl.sum(e, AXIS), weighted


@triton.jit
def _combine(m, total, weighted, other_m, other_total, other_weighted, scale):
    """The statistics of two disjoint sets of classes together."""
    top = tl.maximum(m, other_m)
    shift = tl.where(top == -INFINITY, 0.0, top)
    old = tl.exp((m - shift) * scale)
    new = tl.exp((other_m - shift) * scale)
    moved = tl.where(total > 0, total * (m - shift), 0.0)
    other_moved = tl.where(other_total > 0, other_total * (other_m - shift), 0.0)
    weighted = (weighted + moved) * old + (other_weighted + other_moved) * new
    return top, total * old + other_total * new, weighted


@triton.jit
def _label_statistics(d, same, AXIS: tl.constexpr):
    """(best positive, best negative, sum, number of positives) along an axis."""
    positive = same & (d != -INFINITY)  # not itself, nor beyond the end
    best = tl.max(tl.where(positive, d, -INFINITY), AXIS)
    best_negative = tl.max(tl.where(same, -INFINITY, d), AXIS)
    total = tl.sum(tl.where(positive, d, 0.0), AXIS)
    return best, best_negative, total, tl.sum(tl.where(positive, 1.0, 0.0), AXIS)


@triton.jit
def _store_planes(part_ptr, slot, N, index, live, m, total, weighted):
    at = part_ptr + N.to(tl.int64) * slot + index
    tl.store(at, m, mask=live)
    tl.store(at + N, total, mask=live)
    tl.store(at + 2 * N.to(tl.int64), weighted, mask=live)


@triton.jit
def _store_labels(part_ptr, slot, N, index, live, best, best_negative, total, number):
    at = part_ptr + N.to(tl.int64) * slot + index
    tl.store(at + 3 * N.to(tl.int64), best, mask=live)
    tl.store(at + 4 * N.to(tl.int64), best_negative, mask=live)
    tl.store(at + 5 * N.to(tl.int64), total, mask=live)
    tl.store(at + 6 * N.to(tl.int64), number, mask=live)


# What: softmax statistics of a block of rows over some tiles, and of each tile's columns.
# Passes: one product of all pairs, or of half of them (TRIANGLE). Floor: 2 N M D flops (N^2 D of a
# triangle), (N + M) D elements. Parallelism: (block of rows, part of the tiles). Accuracy: float32
# sums, products as `precision` says, the real maxima. Time: not measured.
@triton.jit(do_not_specialize=LENGTHS)
def _scores_kernel(
    a_ptr, a_inverse_ptr, a_stride, a_step, b_ptr, b_inverse_ptr, b_stride, b_step,
    labels_ptr, column_labels_ptr, temperature_ptr, positive_ptr, column_positive_ptr,
    row_part_ptr, column_part_ptr,
    N: tl.int32, M: tl.int32, D, label_offset: tl.int32, self_offset: tl.int32,
    first: tl.int32, count: tl.int32, per_split: tl.int32, scale: tl.float32,
    TRIANGLE: tl.constexpr, COLUMNS: tl.constexpr, SLOPES: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    block = tl.program_id(0)
    split = tl.program_id(1)
    row_block = block if TRIANGLE else first + block
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < N
    a_factor, a_rest = factors(a_inverse_ptr, N, row, row_live)
    m = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -INFINITY, tl.float32)
    best_negative = tl.full([BLOCK_M], -INFINITY, tl.float32)
    positives = tl.zeros([BLOCK_M], tl.float32)
    number = tl.zeros([BLOCK_M], tl.float32)
    label = row
    if PLANES > 3:
        label = tl.load(labels_ptr + row, mask=row_live, other=0)
    blocks = tl.cdiv(N, BLOCK_M)
    for t in range(split * per_split, tl.minimum(count, (split + 1) * per_split)):
        column_block = t
        if TRIANGLE:  # the tile so many blocks to the right, around the end
            column_block = (row_block + first + t) % blocks
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        column_live = column < M
        used = column_live
        if TRIANGLE:  # half way around, a pair of blocks would come twice
            used = used & ((2 * (first + t) != blocks) | (row_block < first + t))
        b_factor, b_rest = factors(b_inverse_ptr, M, column, column_live)
        d = products(
            a_ptr, a_stride, a_step, row, a_factor, b_ptr, b_stride, b_step, column, b_factor, D,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        d = scaled(d, a_factor, a_rest, b_factor, b_rest)
        own = at_offset(row, column, label_offset, TRIANGLE)
        own = own & row_live[:, None] & used[None, :]
        if tl.sum(own.to(tl.int32)) > 0:
            value = tl.where(own, d, 0.0)
            here = tl.max(own.to(tl.int32), 1) > 0
            tl.store(positive_ptr + row, tl.sum(value, 1), mask=here)
            if COLUMNS:
                here = tl.max(own.to(tl.int32), 0) > 0
                if TRIANGLE:
                    here = here & (column_block != row_block)
                tl.store(column_positive_ptr + column, tl.sum(value, 0), mask=here)
        out = own | at_offset(row, column, self_offset, False)
        out = out | (~row_live)[:, None] | (~used)[None, :]
        d = tl.where(out, -INFINITY, d)
        tile_m, tile_total, tile_weighted = _softmax(d, scale, 1, SLOPES)
        m, total, weighted = _combine(m, total, weighted, tile_m, tile_total, tile_weighted, scale)
        same = out
        if PLANES > 3:
            column_label = tl.load(column_labels_ptr + column, mask=column_live, other=0)
            same = label[:, None] == column_label[None, :]
            tile_best, tile_negative, tile_sum, tile_number = _label_statistics(d, same, 1)
            best = tl.maximum(best, tile_best)
            best_negative = tl.maximum(best_negative, tile_negative)
            positives += tile_sum
            number += tile_number
        if COLUMNS:
            slot = block
            if TRIANGLE:
                slot = t
                d = tl.where(column_block == row_block, -INFINITY, d)
            tile_m, tile_total, tile_weighted = _softmax(d, scale, 0, SLOPES)
            _store_planes(
                column_part_ptr, slot * PLANES, M, column, column_live, tile_m, tile_total,
                tile_weighted,
            )  # fmt: skip
            if PLANES > 3:
                tile_best, tile_negative, tile_sum, tile_number = _label_statistics(d, same, 0)
                _store_labels(
                    column_part_ptr, slot * PLANES, M, column, column_live, tile_best,
                    tile_negative, tile_sum, tile_number,
                )  # fmt: skip
    _store_planes(row_part_ptr, split * PLANES, N, row, row_live, m, total, weighted)
    if PLANES > 3:
        _store_labels(
            row_part_ptr, split * PLANES, N, row, row_live, best, best_negative, positives, number
        )


# What: folds the slots of a wave into the statistics of all waves so far. Passes: one.
# Bytes: 4 PLANES a slot read. Parallelism: blocks of rows. Accuracy: float32.
@triton.jit(do_not_specialize=["N", "slots"])
def _merge_kernel(
    part_ptr, running_ptr, temperature_ptr, N: tl.int32, slots: tl.int32, scale: tl.float32,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    plane = N.to(tl.int64)
    m = tl.load(running_ptr + row, mask=live, other=0.0)
    total = tl.load(running_ptr + plane + row, mask=live, other=0.0)
    weighted = tl.load(running_ptr + 2 * plane + row, mask=live, other=0.0)
    for slot in range(0, slots):
        at = part_ptr + plane * PLANES * slot + row
        other_m = tl.load(at, mask=live, other=0.0)
        other_total = tl.load(at + plane, mask=live, other=0.0)
        other_weighted = tl.load(at + 2 * plane, mask=live, other=0.0)
        m, total, weighted = _combine(
            m, total, weighted, other_m, other_total, other_weighted, scale
        )
    tl.store(running_ptr + row, m, mask=live)
    tl.store(running_ptr + plane + row, total, mask=live)
    tl.store(running_ptr + 2 * plane + row, weighted, mask=live)
    if PLANES > 3:
        for k in tl.static_range(3, PLANES):
            value = tl.load(running_ptr + k * plane + row, mask=live, other=0.0)
            for slot in range(0, slots):
                at = part_ptr + plane * (slot * PLANES + k) + row
                other = tl.load(at, mask=live, other=0.0)
                value = tl.maximum(value, other) if k < 5 else value + other
            tl.store(running_ptr + k * plane + row, value, mask=live)


def _neutral(planes, count, like):
    running = torch.zeros((planes, count), dtype=torch.float32, device=like.device)
    for k in (0, 3, 4)[: 1 if planes == SOFTMAX_PLANES else 3]:
        running[k] = -torch.inf
    return running


def _start(planes, count, like, before):
    """Statistics and positives: those of `before`, (count, planes and the positive if kept)."""
    if before is None:
        running = _neutral(planes, count, like)
        return running, running.new_zeros(count)
    running = before.mT[:planes].to(torch.float32, copy=True).contiguous()
    positive = before.mT[planes].float() if before.shape[1] > planes else running.new_zeros(count)
    return running, positive


def softmax_statistics(
    a, b, temperatures, temperature, *, label_offset, self_offset, triangle=False, columns=False,
    slopes=False, labels=None, column_labels=None, before=None,
):  # fmt: skip
    """Statistics and positives of the rows, and of the columns if asked for.

    Args:
        a: the `Side` of the rows.
        b: that of the columns; of a triangle, the same.
        temperatures: the temperature as a 0-dim tensor, or None.
        temperature: the number that counts without the tensor.
        label_offset: from a row to its positive, which is no other class; NOWHERE for none.
        self_offset: from a row to the column that is no class of its.
        triangle: rows and columns are the same; multiply each pair once.
        columns: statistics of the columns too; of a triangle they go to the rows.
        slopes: weighted sums.
        labels: of the rows, for LABEL_PLANES.
        column_labels: of the columns.
        before: None, or what an earlier call found of other classes, (N, PLANES and the positive
            without labels) float64; of the columns after the rows.

    Returns:
        `(running (PLANES, N), positive (N,), column_running, column_positive)`; the last two are
        None unless `columns` without `triangle`.
    """
    t = tiles(a.x)
    N, M = a.count, b.count
    planes = SOFTMAX_PLANES if labels is None else LABEL_PLANES
    running, positive = _start(planes, N, a.x, None if before is None else before[:N])
    column_running = column_positive = None
    if columns and not triangle:
        column_before = None if before is None else before[N:]
        column_running, column_positive = _start(planes, M, a.x, column_before)
    if N == 0 or M == 0:
        return running, positive, column_running, column_positive
    row_blocks, column_blocks = triton.cdiv(N, t.rows), triton.cdiv(M, t.columns)
    both = columns or triangle
    steps = row_blocks // 2 + 1 if triangle else row_blocks
    wave = min(SLOTS, steps) if both else steps
    column_part = running.new_empty((wave, planes, M)) if both else running
    for first in range(0, steps, wave):
        size = min(wave, steps - first)
        programs, count = (row_blocks, size) if triangle else (size, column_blocks)
        splits = max(1, min(triton.cdiv(PROGRAMS, programs), count, SLOTS))
        per_split = triton.cdiv(count, splits)
        splits = triton.cdiv(count, per_split)
        row_part = running.new_empty((splits, planes, N))
        if not triangle and size < row_blocks:  # rows of other waves are not written
            row_part[:] = _neutral(planes, N, a.x)
        with rows.device_of(a.x):
            _scores_kernel[(programs, splits)](
                *a.arguments(), *b.arguments(), labels, column_labels, temperatures, positive,
                positive if column_positive is None else column_positive, row_part, column_part,
                N, M, a.x.shape[1], label_offset, self_offset, first, count, per_split,
                1.0 / temperature, TRIANGLE=triangle, COLUMNS=both, SLOPES=slopes, PLANES=planes,
                PRECISION=precision(a.x), **t.blocks(), **t.launch(),
            )  # fmt: skip
            _merge(row_part, splits, running, temperatures, temperature)
            if both:
                into = running if triangle else column_running
                _merge(column_part, size, into, temperatures, temperature)
    return running, positive, column_running, column_positive


def _merge(part, slots, running, temperatures, temperature):
    planes, N = running.shape
    _merge_kernel[(triton.cdiv(N, MERGE_BLOCK),)](
        part, running, temperatures, N, slots, 1.0 / temperature, PLANES=planes, BLOCK=MERGE_BLOCK
    )
