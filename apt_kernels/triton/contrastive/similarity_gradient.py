"""The gradient of rows from the coefficients of their pairs, for every contrastive loss.

A program owns a block of rows and a part of their width, and walks over all columns: it multiplies
the rows again, turns the scores into coefficients, and adds coefficient times column to sums in
registers. A coefficient holds what the pair does to the losses of both of its rows, so that one
product is enough and nothing is added by two programs.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.contrastive.similarity import (
    LENGTHS,
    at_offset,
    factors,
    gradient_precision,
    precision,
    products,
    rounded_to_tf32,
    row_products,
    scale_of,
    scaled,
    tiles,
    unit_rows,
)

SOFTMAX, SIGMOID, SUP_CON = 0, 1, 2
_SOFTMAX = tl.constexpr(SOFTMAX)
_SIGMOID = tl.constexpr(SIGMOID)
_SUP_CON = tl.constexpr(SUP_CON)


@triton.jit
def _load_side(weight_ptr, stats_ptr, index, live, WIDTH: tl.constexpr):
    """(weight, max, share, log of the sum) of rows; see the forward kernels for their stats."""
    weight = tl.load(weight_ptr + index, mask=live, other=0.0)
    at = stats_ptr + index.to(tl.int64) * WIDTH
    top = tl.load(at, mask=live, other=0.0)
    share = tl.load(at + 1, mask=live, other=0.0)
    log_sum = tl.load(at + 2, mask=live, other=0.0)
    return weight, top, share, log_sum


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


# What: the gradient of a block of rows and a part of their width. WEIGHTS: upstream gradients of
# the losses of rows (1), of columns (2), of both (3).
# Passes: one product of all pairs for the scores, again for every part of the width, and one for
# the gradient. Floor: 4 N M D flops. Bytes: the columns once a block of rows. Parallelism: (block
# of rows, part of the width). Accuracy: float32 sums; coefficients are rounded to the rows' type
# (TF32 beside float16) for the product. Time: not measured.
@triton.jit(do_not_specialize=LENGTHS)
def _similarity_bwd_kernel(
    weight_ptr, stats_ptr, labels_ptr, column_weight_ptr, column_stats_ptr, column_labels_ptr,
    a_ptr, a_inverse_ptr, a_stride, a_step, b_ptr, b_inverse_ptr, b_stride, b_step,
    own_ptr, own_inverse_ptr, own_stride, own_step,
    temperature_ptr, bias_ptr, grad_ptr,
    N: tl.int32, M: tl.int32, D, label_offset: tl.int32, self_offset: tl.int32,
    scale: tl.float32, bias: tl.float32,
    LOSS: tl.constexpr, WEIGHTS: tl.constexpr, TRIANGLE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < N
    a_factor, a_rest = factors(a_inverse_ptr, N, row, live)
    weight = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32)
    share = tl.zeros([BLOCK_M], tl.float32)
    log_sum = tl.zeros([BLOCK_M], tl.float32)
    if WEIGHTS != 2:
        if LOSS == _SIGMOID:
            weight = tl.load(weight_ptr + row, mask=live, other=0.0)
        else:
            weight, top, share, log_sum = _load_side(weight_ptr, stats_ptr, row, live, WIDTH)
        if LOSS == _SUP_CON:  # a row without a positive has no loss
            weight = tl.where(share > 0, weight, 0.0)
    label = row
    if LOSS == _SUP_CON:
        label = tl.load(labels_ptr + row, mask=live, other=0)
    part = tl.program_id(1) * PART + tl.arange(0, PART)
    part_live = part < D
    part = part.to(tl.int64)
    grad = tl.zeros([BLOCK_M, PART], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)  # the gradient's product with the unit row
    for start in range(0, M, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        column_live = column < M
        b_factor, b_rest = factors(b_inverse_ptr, M, column, column_live)
        raw = products(
            a_ptr, a_stride, a_step, row, a_factor, b_ptr, b_stride, b_step, column, b_factor, D,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        d = scaled(raw, a_factor, a_rest, b_factor, b_rest)
        column_weight = tl.zeros([BLOCK_N], tl.float32)
        column_share = tl.zeros([BLOCK_N], tl.float32)
        if LOSS == _SIGMOID:
            if WEIGHTS != 1:
                column_weight = tl.load(column_weight_ptr + column, mask=column_live, other=0.0)
            coefficient = (weight[:, None] + column_weight[None, :]) * sigmoid(d * scale + bias)
        else:
            coefficient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if WEIGHTS != 2:
                p = tl.exp((d - top[:, None]) * scale - log_sum[:, None])
                coefficient += weight[:, None] * p
            if WEIGHTS != 1:
                column_weight, column_top, column_share, column_log_sum = _load_side(
                    column_weight_ptr, column_stats_ptr, column, column_live, WIDTH
                )
                if LOSS == _SUP_CON:
                    column_weight = tl.where(column_share > 0, column_weight, 0.0)
                p = tl.exp((d - column_top[None, :]) * scale - column_log_sum[None, :])
                coefficient += column_weight[None, :] * p
            if LOSS == _SUP_CON:
                both = (weight * share)[:, None] + (column_weight * column_share)[None, :]
                other = tl.load(column_labels_ptr + column, mask=column_live, other=0)
                same = label[:, None] == other[None, :]
                coefficient = tl.where(same, coefficient - both, coefficient)
        out = at_offset(row, column, label_offset, TRIANGLE)
        out = out | at_offset(row, column, self_offset, False) | (~column_live)[None, :]
        coefficient = tl.where(out | (~live)[:, None], 0.0, coefficient)
        # Rounded as the product will see it, so that both sums are of the same coefficients.
        coefficient = coefficient * b_factor[None, :]
        b_row = b_ptr + column.to(tl.int64) * b_stride
        b_mask = (b_factor != 0)[:, None] & part_live[None, :]
        b = tl.load(b_row[:, None] + part[None, :] * b_step, mask=b_mask, other=0.0)
        if b_ptr.dtype.element_ty == tl.float16:
            c = rounded_to_tf32(coefficient)
            along += tl.sum(c * raw, 1) * a_factor
            grad = tl.dot(c, b.to(tl.float32), grad, input_precision=GRADIENT_PRECISION)
        else:
            c = coefficient.to(b_ptr.dtype.element_ty)
            along += tl.sum(c.to(tl.float32) * raw, 1) * a_factor
            grad = tl.dot(c, b, grad, input_precision=GRADIENT_PRECISION)
    written = live[:, None] & part_live[None, :]
    # The positive comes in last: beside it the many small coefficients would lose digits.
    if LOSS != _SUP_CON:
        own = row + label_offset
        if TRIANGLE:
            own = tl.where(own < M, own, row - label_offset)
        here = live & (own >= 0) & (own < M)
        d = row_products(
            a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, b_ptr, b_inverse_ptr, b_stride,
            b_step, M, own, here, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if LOSS == _SIGMOID:
            if WEIGHTS != 1:
                weight += tl.load(column_weight_ptr + own, mask=here, other=0.0)
            positive = -weight * sigmoid(-(d * scale + bias))
        else:  # the share of the other classes: p - 1 without its cancellation
            if WEIGHTS != 2:  # loaded again: through the loop it would be spilled
                _, _, share, _ = _load_side(weight_ptr, stats_ptr, row, live, WIDTH)
            positive = -weight * share
            if WEIGHTS != 1:
                other_weight, _, other_share, _ = _load_side(
                    column_weight_ptr, column_stats_ptr, own, here, WIDTH
                )
                positive -= other_weight * other_share
        positive = tl.where(here, positive, 0.0)
        along += positive * d
        unit, _ = unit_rows(b_ptr, b_inverse_ptr, b_stride, b_step, M, own, here, part, D)
        grad += positive[:, None] * unit
    if own_ptr is not None:  # a positive that is no column
        positive = -weight * share
        along += positive * tl.load(stats_ptr + row.to(tl.int64) * WIDTH + 3, mask=live, other=0.0)
        unit, _ = unit_rows(own_ptr, own_inverse_ptr, own_stride, own_step, N, row, live, part, D)
        grad += positive[:, None] * unit
    if a_inverse_ptr is not None:
        unit, _ = unit_rows(a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, part, D)
        grad = (grad - along[:, None] * unit) * a_factor[:, None]
    at = grad_ptr + row.to(tl.int64)[:, None] * D + part[None, :]
    tl.store(at, (grad * scale).to(grad_ptr.dtype.element_ty), mask=written)


def gradient(
    a, b, weights, stats, column_weights, column_stats, temperatures, temperature, *,
    label_offset, self_offset, loss=SOFTMAX, triangle=False, own=None, biases=None, bias=0.0,
    labels=None, column_labels=None, unrounded=False,
):  # fmt: skip
    """The gradient (N, D) of the rows of side `a`, contiguous, in their dtype.

    Args:
        a: the `Side` of the rows.
        b: that of the columns.
        weights: upstream gradients of the losses of rows, (N,) float32, or None.
        stats: of the rows, as the loss's forward pass made them; None for the sigmoid.
        column_weights: those of columns, (M,), or None.
        column_stats: of the columns.
        temperatures: the temperature as a 0-dim tensor, or None.
        temperature: the number that counts without the tensor.
        label_offset: from a row to its positive.
        self_offset: from a row to the column that is no class of its.
        loss: which coefficients.
        triangle: rows and columns are the same, and a positive lies both ways.
        own: a `Side` of positives that are no columns, one a row.
        biases: the bias of the sigmoid as a 0-dim tensor, or None.
        bias: the number that counts without the tensor.
        labels: of the rows of SUP_CON.
        column_labels: of its columns.
        unrounded: in float32, to be added to others.
    """
    N, D = a.x.shape
    dtype = torch.float32 if unrounded else a.x.dtype
    grad = torch.empty((N, D), dtype=dtype, device=a.x.device)
    if N == 0:
        return grad
    t = tiles(a.x, gradient=True)
    if loss == SOFTMAX and not triangle and None not in (weights, column_weights):
        t = dataclasses.replace(t, depth=min(32, t.depth))  # deeper ones spill on sm_100
    own_arguments = (None, None, 0, 0) if own is None else own.arguments()
    some_stats = stats if stats is not None else column_stats
    with rows.device_of(a.x):
        _similarity_bwd_kernel[(triton.cdiv(N, t.rows), triton.cdiv(D, t.part))](
            weights, stats, labels, column_weights, column_stats, column_labels, *a.arguments(),
            *b.arguments(), *own_arguments, temperatures, biases, grad, N, b.count, D,
            label_offset, self_offset, 1.0 / temperature, bias,
            LOSS=loss, WEIGHTS=(weights is not None) + 2 * (column_weights is not None),
            TRIANGLE=triangle, WIDTH=1 if some_stats is None else some_stats.shape[1],
            PART=t.part, PRECISION=precision(a.x), GRADIENT_PRECISION=gradient_precision(a.x),
            **t.blocks(), **t.launch(),
        )  # fmt: skip
    return grad
