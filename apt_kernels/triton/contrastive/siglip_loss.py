"""siglip_loss in Triton: sums over the pairs of each row, tile by tile."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.logistic import log1p_polynomial
from apt_kernels.triton.contrastive.similarity import (
    INFINITY,
    LENGTHS,
    NOWHERE,
    at_offset,
    factors,
    precision,
    products,
    scale_of,
    scaled,
    side,
    tiles,
)
from apt_kernels.triton.contrastive.similarity_gradient import SIGMOID, gradient, sigmoid

BLOCK = 128
PROGRAMS, SPLITS = 512, 64
PLANES = 4  # of a row: its loss, its derivatives at scale and bias, the largest d of the others


@triton.jit
def _softplus(x):
    """log(1 + e^x); a small e^x keeps its digits."""
    return tl.maximum(x, 0.0) + log1p_polynomial(tl.exp(-tl.abs(x)))


# What: the losses of a block of rows over some tiles, their derivatives at scale and bias.
# Passes: one product of all pairs. Floor: 2 N M D flops, (N + M) D elements. Parallelism: (block of
# rows, part of the tiles). Accuracy: float32. Time: not measured.
@triton.jit(do_not_specialize=LENGTHS)
def _sigmoid_losses_kernel(
    a_ptr, a_inverse_ptr, a_stride, a_step, b_ptr, b_inverse_ptr, b_stride, b_step,
    temperature_ptr, bias_ptr, positive_ptr, part_ptr,
    N: tl.int32, M: tl.int32, D, label_offset: tl.int32, count: tl.int32, per_split: tl.int32,
    scale: tl.float32, bias: tl.float32,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32)
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < N
    a_factor, a_rest = factors(a_inverse_ptr, N, row, live)
    loss = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    bias_slope = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -INFINITY, tl.float32)
    for t in range(split * per_split, tl.minimum(count, (split + 1) * per_split)):
        column = t * BLOCK_N + tl.arange(0, BLOCK_N)
        column_live = column < M
        b_factor, b_rest = factors(b_inverse_ptr, M, column, column_live)
        d = products(
            a_ptr, a_stride, a_step, row, a_factor, b_ptr, b_stride, b_step, column, b_factor, D,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        d = scaled(d, a_factor, a_rest, b_factor, b_rest)
        own = at_offset(row, column, label_offset, False) & live[:, None] & column_live[None, :]
        if tl.sum(own.to(tl.int32)) > 0:
            here = tl.max(own.to(tl.int32), 1) > 0
            tl.store(positive_ptr + row, tl.sum(tl.where(own, d, 0.0), 1), mask=here)
        x = d * scale + bias
        x = tl.where(own, -x, x)
        wrong = tl.where(own, -sigmoid(x), sigmoid(x))
        inside = column_live[None, :]
        loss += tl.sum(tl.where(inside, _softplus(x), 0.0), 1)
        slope += tl.sum(tl.where(inside, wrong * d, 0.0), 1)
        bias_slope += tl.sum(tl.where(inside, wrong, 0.0), 1)
        best = tl.maximum(best, tl.max(tl.where(own | (~inside), -INFINITY, d), 1))
    plane = N.to(tl.int64)
    at = part_ptr + plane * (split * 4) + row
    tl.store(at, loss, mask=live)
    tl.store(at + plane, slope, mask=live)
    tl.store(at + 2 * plane, bias_slope, mask=live)
    tl.store(at + 3 * plane, best, mask=live)


# What: adds the parts of every row. Passes: one. Bytes: 16 a row and part read.
# Parallelism: blocks of rows. Accuracy: float32.
@triton.jit(do_not_specialize=["N", "splits"])
def _sigmoid_results_kernel(
    part_ptr, positive_ptr, losses_ptr, right_ptr, slopes_ptr, bias_slopes_ptr, N: tl.int32,
    splits: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    plane = N.to(tl.int64)
    loss = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    bias_slope = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], -INFINITY, tl.float32)
    for split in range(0, splits):
        at = part_ptr + plane * (split * 4) + row
        loss += tl.load(at, mask=live, other=0.0)
        slope += tl.load(at + plane, mask=live, other=0.0)
        bias_slope += tl.load(at + 2 * plane, mask=live, other=0.0)
        best = tl.maximum(best, tl.load(at + 3 * plane, mask=live, other=0.0))
    positive = tl.load(positive_ptr + row, mask=live, other=0.0)
    tl.store(losses_ptr + row, loss, mask=live)
    right = (positive > best) & (loss == loss)  # the maximum does not see NaN
    tl.store(right_ptr + row, tl.where(right, 1.0, 0.0), mask=live)
    if slopes_ptr is not None:
        tl.store(slopes_ptr + row, slope, mask=live)
        tl.store(bias_slopes_ptr + row, bias_slope, mask=live)


def siglip_loss_fwd(
    query, key, temperature_tensor, temperature, logit_bias_tensor, logit_bias, normalize,
    label_offset, need_slopes, before=None,
):  # fmt: skip
    """(losses (N,), right (N,), slopes (N,)|(0,), bias_slopes (N,)|(0,), after (N,5)|(0,)).

    before, after: (the largest d of the others, the positive's, loss, slope, bias slope) of rows.
    """
    a, b = side(query, normalize), side(key, normalize)
    N, M = a.count, b.count
    t = tiles(query)
    count = triton.cdiv(M, t.columns)
    row_blocks = triton.cdiv(N, t.rows)
    splits = max(1, min(triton.cdiv(PROGRAMS, max(row_blocks, 1)), count, SPLITS))
    per_split = triton.cdiv(count, splits) if count else 1
    splits = triton.cdiv(count, per_split)
    parts = splits + (before is not None)
    part = query.new_empty((parts, PLANES, N), dtype=torch.float32)
    losses, right, positive = (part.new_empty(N) for _ in range(3))
    slopes, bias_slopes = (part.new_empty(N if need_slopes else 0) for _ in range(2))
    after = part.new_empty(0, dtype=torch.float64) if before is None else before.clone()
    if N == 0:
        return losses, right, slopes, bias_slopes, after
    if before is not None:
        part[-1], positive = before.mT[[2, 3, 4, 0]], before[:, 1].float()
    with rows.device_of(query):
        _sigmoid_losses_kernel[(row_blocks, splits)](
            *a.arguments(), *b.arguments(), temperature_tensor, logit_bias_tensor, positive, part,
            N, M,
            query.shape[1], label_offset, count, per_split, 1.0 / temperature, logit_bias,
            PRECISION=precision(query), **t.blocks(), **t.launch(),
        )  # fmt: skip
        _sigmoid_results_kernel[(triton.cdiv(N, BLOCK),)](
            part, positive, losses, right, slopes if need_slopes else None,
            bias_slopes if need_slopes else None, N, parts, BLOCK=BLOCK,
        )  # fmt: skip
    if before is not None:
        after[:, 0], after[:, 1] = part[:, 3].amax(0), positive
        after[:, 2:] = part[:, :3].double().sum(0).mT
    return losses, right, slopes, bias_slopes, after


def siglip_loss_bwd(
    grad_losses, grad_column_losses, query, key, temperature_tensor, temperature,
    logit_bias_tensor, logit_bias, normalize, label_offset, need_query, need_key, unrounded=False,
):  # fmt: skip
    """(grad_query, grad_key), each (0,) unless needed; `unrounded` in float32."""
    a, b = side(query, normalize), side(key, normalize)
    options = {
        "self_offset": NOWHERE,
        "loss": SIGMOID,
        "biases": logit_bias_tensor,
        "bias": logit_bias,
    }
    options["unrounded"] = unrounded
    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        grad_query = gradient(
            a, b, grad_losses, None, grad_column_losses, None, temperature_tensor, temperature,
            label_offset=label_offset, **options,
        )  # fmt: skip
    if need_key:
        grad_key = gradient(
            b, a, grad_column_losses, None, grad_losses, None, temperature_tensor, temperature,
            label_offset=-label_offset, **options,
        )  # fmt: skip
    return grad_query, grad_key
