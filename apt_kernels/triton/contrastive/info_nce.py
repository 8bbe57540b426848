"""info_nce in Triton: tiles of the similarities, never the whole."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.logistic import log1p
from apt_kernels.triton.contrastive.similarity import (
    INFINITY,
    NOWHERE,
    ROWS,
    row_products,
    scale_of,
    side,
    unit_rows,
    width_block,
)
from apt_kernels.triton.contrastive.similarity_gradient import gradient
from apt_kernels.triton.contrastive.similarity_softmax import softmax_statistics

BLOCK = 128
STATS = 4  # a row: the largest d, the share of the other classes, log of the sum, the positive's d


# What: losses, accuracy, slopes and stats of rows from the statistics of their other classes.
# Passes: one. Bytes: 16 a row read, 28 written. Parallelism: blocks of rows. Accuracy: float32; a
# loss near 0 keeps its digits, as the positive is apart from the others.
@triton.jit(do_not_specialize=["N"])
def _softmax_results_kernel(
    running_ptr, positive_ptr, temperature_ptr, losses_ptr, right_ptr, slopes_ptr, stats_ptr,
    N: tl.int32, scale: tl.float32, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    plane = N.to(tl.int64)
    m = tl.load(running_ptr + row, mask=live, other=0.0)
    total = tl.load(running_ptr + plane + row, mask=live, other=1.0)
    weighted = tl.load(running_ptr + 2 * plane + row, mask=live, other=0.0)
    positive = tl.load(positive_ptr + row, mask=live, other=0.0)
    alone = total == 0  # no other class; of NaN the sum is NaN, the maximum is not
    m = tl.where(alone, positive, m)
    # a wrong temperature and a positive that is no number are seen also by a row that is alone
    gap = (m - positive) * scale + tl.log(total)
    gap = tl.where(positive < INFINITY, gap, float("nan"))
    e = tl.exp(-tl.abs(gap))
    loss = tl.where(gap == gap, tl.maximum(gap, 0.0) + log1p(e), gap)
    share = tl.where(gap >= 0, 1.0, e) / (1.0 + e)
    share = tl.where(gap == gap, share, gap)
    tl.store(losses_ptr + row, loss, mask=live)
    right = (alone | (positive > m)) & (gap == gap)
    tl.store(right_ptr + row, tl.where(right, 1.0, 0.0), mask=live)
    if slopes_ptr is not None:
        mean = tl.where(alone, 0.0, m - positive + weighted / total)
        tl.store(slopes_ptr + row, share * mean, mask=live)
    top = tl.maximum(m, positive)
    at = stats_ptr + row.to(tl.int64) * WIDTH
    tl.store(at, top, mask=live)
    tl.store(at + 1, share, mask=live)
    # not loss + positive - top: of large numbers the difference would have lost the digits
    others = tl.where(alone, 0.0, total * tl.exp((m - top) * scale))
    tl.store(at + 2, tl.log(others + tl.exp((positive - top) * scale)), mask=live)
    tl.store(at + 3, positive, mask=live)


# What: the products of the unit rows of two matrices, row by row. Passes: one.
# Bytes: 2 D elements a row read. Parallelism: blocks of rows. Accuracy: float32.
@triton.jit(do_not_specialize=["N"])
def _row_products_kernel(
    a_ptr, a_inverse_ptr, a_stride, a_step, b_ptr, b_inverse_ptr, b_stride, b_step, out_ptr,
    N: tl.int32, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    d = row_products(
        a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, b_ptr, b_inverse_ptr, b_stride,
        b_step, N, row, live, D, ROWS, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + row, d, mask=live)


# What: the gradient of the rows of b, each the positive of the row of a and nothing else.
# Passes: one. Bytes: 2 D elements a row read, D written. Parallelism: blocks of rows.
# Accuracy: float32.
@triton.jit(do_not_specialize=["N"])
def _own_bwd_kernel(
    weight_ptr, stats_ptr, a_ptr, a_inverse_ptr, a_stride, a_step, b_ptr, b_inverse_ptr, b_stride,
    b_step, temperature_ptr, grad_ptr, N: tl.int32, D, scale: tl.float32, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    at = stats_ptr + row.to(tl.int64) * WIDTH
    share = tl.load(at + 1, mask=live, other=0.0)
    positive = tl.load(at + 3, mask=live, other=0.0)
    coefficient = -tl.load(weight_ptr + row, mask=live, other=0.0) * share * scale
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        grad, _ = unit_rows(a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, column, D)
        if b_inverse_ptr is not None:
            b, factor = unit_rows(b_ptr, b_inverse_ptr, b_stride, b_step, N, row, live, column, D)
            grad = (grad - positive[:, None] * b) * factor[:, None]
        grad = (grad * coefficient[:, None]).to(grad_ptr.dtype.element_ty)
        to = grad_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(to, grad, mask=live[:, None] & (column < D)[None, :])


def softmax_results(running, positive, temperature_tensor, temperature, slopes):
    """(losses, right, slopes or (0,), stats (N, STATS)) of rows, float32."""
    N = running.shape[1]
    losses, right = running.new_empty(N), running.new_empty(N)
    row_slopes = running.new_empty(N if slopes else 0)
    stats = running.new_empty((N, STATS))
    if N:
        with rows.device_of(running):
            _softmax_results_kernel[(triton.cdiv(N, BLOCK),)](
                running, positive, temperature_tensor, losses, right,
                row_slopes if slopes else None, stats, N, 1.0 / temperature, WIDTH=STATS,
                BLOCK=BLOCK,
            )  # fmt: skip
    return losses, right, row_slopes, stats


def state_of(before, running, positive, column_running=None, column_positive=None):
    """What the next call on other classes takes as `before`; (0,) where this one took none."""
    if before is None:
        return running.new_empty(0, dtype=torch.float64)
    state = torch.cat([running, positive[None]]).mT.double()
    if column_running is not None:
        state = torch.cat([state, torch.cat([column_running, column_positive[None]]).mT.double()])
    return state.contiguous()


def _one_dtype(query, negatives):
    """A queue may be of another dtype; then both are multiplied as float32."""
    if negatives is None or negatives.dtype == query.dtype:
        return query, negatives
    return query.float(), negatives.float()


def info_nce_fwd(
    query, key, negatives, temperature_tensor, temperature, normalize, symmetric, label_offset,
    self_offset, need_slopes, before=None,
):  # fmt: skip
    """(losses (N,), right (N,), slopes (N,)|(0,), row_stats (N,4), column_stats (N,4)|(0,4), after)

    before, after: statistics of rows (and columns); with `before` the results are of rows alone.
    """
    query, negatives = _one_dtype(query, negatives)
    a = side(query, normalize)
    itself = NOWHERE if self_offset is None else self_offset
    options = {"slopes": need_slopes, "self_offset": itself}
    column_running = column_positive = None
    if negatives is None:
        running, positive, column_running, column_positive = softmax_statistics(
            a, side(key, normalize), temperature_tensor, temperature, label_offset=label_offset,
            columns=symmetric, before=before, **options,
        )  # fmt: skip
    else:
        running, positive, _, _ = softmax_statistics(
            a,
            side(negatives, normalize),
            temperature_tensor,
            temperature,
            label_offset=NOWHERE,
            **options,
        )
        if a.count:
            own = side(key, normalize)
            with rows.device_of(query):
                _row_products_kernel[(triton.cdiv(a.count, ROWS),)](
                    *a.arguments(), *own.arguments(), positive, a.count, query.shape[1],
                    ROWS=ROWS, BLOCK=width_block(query),
                )  # fmt: skip
    losses, right, slopes, stats = softmax_results(
        running, positive, temperature_tensor, temperature, need_slopes
    )
    after = state_of(before, running, positive, column_running, column_positive)
    column_stats = stats.new_empty((0, stats.shape[1]))
    if symmetric and before is None:
        more, more_right, more_slopes, column_stats = softmax_results(
            column_running, column_positive, temperature_tensor, temperature, need_slopes
        )
        losses, right = 0.5 * (losses + more), 0.5 * (right + more_right)
        slopes = 0.5 * (slopes + more_slopes)
    return losses, right, slopes, stats, column_stats, after


def info_nce_bwd(
    grad_losses, grad_column_losses, query, key, negatives, temperature_tensor, temperature,
    normalize, label_offset, self_offset, row_stats, column_stats, need_query, need_key,
    need_negatives, unrounded=False,
):  # fmt: skip
    """(grad_query, grad_key, grad_negatives), each (0,) unless needed; `unrounded` in float32."""
    itself = NOWHERE if self_offset is None else self_offset
    if negatives is not None:
        return _with_negatives(
            grad_losses, query, key, negatives, temperature_tensor, temperature, normalize,
            row_stats,
            need_query, need_key, need_negatives,
        )  # fmt: skip
    a, b = side(query, normalize), side(key, normalize)
    row_side = (grad_losses, row_stats if grad_losses is not None else None)
    column_side = (grad_column_losses, column_stats if grad_column_losses is not None else None)
    grad_query, grad_key, none = (query.new_empty(0) for _ in range(3))
    if need_query:
        grad_query = gradient(
            a, b, *row_side, *column_side, temperature_tensor, temperature,
            label_offset=label_offset,
            self_offset=itself, unrounded=unrounded,
        )  # fmt: skip
    if need_key:
        grad_key = gradient(
            b, a, *column_side, *row_side, temperature_tensor, temperature,
            label_offset=-label_offset,
            self_offset=itself if self_offset is None else -itself, unrounded=unrounded,
        )  # fmt: skip
    return grad_query, grad_key, none


def _with_negatives(
    grad_losses, query, key, negatives, temperature_tensor, temperature, normalize, stats,
    need_query, need_key, need_negatives,
):  # fmt: skip
    q, n = _one_dtype(query, negatives)
    a, b, own = side(q, normalize), side(n, normalize), side(key, normalize)
    nowhere = {"label_offset": NOWHERE, "self_offset": NOWHERE}
    grad_query, grad_key, grad_negatives = (query.new_empty(0) for _ in range(3))
    if need_query:
        grad_query = gradient(
            a,
            b,
            grad_losses,
            stats,
            None,
            None,
            temperature_tensor,
            temperature,
            own=own,
            **nowhere,
        ).to(query.dtype)
    if need_key:
        grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        if own.count:
            with rows.device_of(key):
                _own_bwd_kernel[(triton.cdiv(own.count, ROWS),)](
                    grad_losses, stats, *a.arguments(), *own.arguments(), temperature_tensor,
                    grad_key,
                    own.count, key.shape[1], 1.0 / temperature, WIDTH=STATS, ROWS=ROWS,
                    BLOCK=width_block(key),
                )  # fmt: skip
    if need_negatives:
        grad_negatives = gradient(
            b, a, None, None, grad_losses, stats, temperature_tensor, temperature, **nowhere
        ).to(negatives.dtype)
    return grad_query, grad_key, grad_negatives
