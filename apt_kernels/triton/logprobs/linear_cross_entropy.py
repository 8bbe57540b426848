"""linear_cross_entropy in Triton: loss, predictions and gradients from hidden states in one call.

Products, in units of rows x D x V multiply-adds, counting only rows whose label is not ignored
(the number needed in brackets): loss alone 1 [1]; with grad_hidden 2 [2]; with grad_weight 4 [3]:
keeping the logits of enough rows to spare the fourth would take a large part of the memory
that this operation is there to save.
"""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.head import launch as head
from apt_kernels.triton.head.logits import live_rows, merged_statistics

MEAN = 1
ROWS = 128  # rows of a program that merges statistics
SUMMED = 1024  # rows that the last program adds up at a time


# What: loss, log-sum-exp and whether the prediction was right, of live rows.
# Passes: one over the statistics. Bytes: 16 or 20 a row and part. Parallelism: 128 rows a
# program. Accuracy: float32.
@triton.jit(do_not_specialize=["row_begin", "row_end", "splits", "V"])
def _linear_cross_entropy_fwd_kernel(
    partials_ptr, best_ptr, token_z_ptr, labels_ptr, rows_ptr, count_ptr, losses_ptr, right_ptr,
    lse_ptr, row_begin: tl.int32, row_end: tl.int32, splits: tl.int32, V: tl.int32,
    smoothing: tl.float32, BLOCK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    first = row_begin + tl.program_id(0) * BLOCK
    place, row, live, end = live_rows(rows_ptr, count_ptr, first, row_end, BLOCK)
    if first >= end:
        return
    at = place - row_begin
    count = (row_end - row_begin).to(tl.int64)
    m, s, u = merged_statistics(partials_ptr, at, live, count, splits, EXTRA)
    log_s = tl.log(s)
    tl.store(lse_ptr + row * 2, m, mask=live)
    tl.store(lse_ptr + row * 2 + 1, log_s, mask=live)

    label = tl.load(labels_ptr + row, mask=live, other=-1)
    inside = (label >= 0) & (label < V)
    z = tl.load(token_z_ptr + at, mask=live & inside, other=0.0)
    loss = -(z - m - log_s)
    if EXTRA == 2:
        loss = (1.0 - smoothing) * loss - smoothing * (u / V - m - log_s)
    tl.store(losses_ptr + place, tl.where(inside, loss, float("nan")), mask=live)

    top_ptr = partials_ptr + 3 * splits * count + at
    top = tl.load(top_ptr, mask=live, other=0.0)
    best = tl.load(best_ptr + at, mask=live, other=0)
    for split in range(1, splits):
        part_top = tl.load(top_ptr + split * count, mask=live, other=0.0)
        part_best = tl.load(best_ptr + split * count + at, mask=live, other=0)
        best = tl.where(part_top > top, part_best, best)
        top = tl.maximum(top, part_top)
    tl.store(right_ptr + place, (best == label).to(tl.int32), mask=live)


# What: the sum of the live rows' losses times a factor, and the number of right predictions.
# Passes: one. Bytes: 8 a live row. Parallelism: one program, so that the order of the sum is
# fixed. Accuracy: float32.
@triton.jit
def _sum_losses_kernel(
    losses_ptr, right_ptr, count_ptr, factor_ptr, loss_ptr, correct_ptr, BLOCK: tl.constexpr
):
    count = tl.load(count_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    correct = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + place, mask=place < count, other=0.0)
        correct += tl.load(right_ptr + place, mask=place < count, other=0).to(tl.int64)
    tl.store(loss_ptr, tl.sum(total, 0) * tl.load(factor_ptr))
    tl.store(correct_ptr, tl.sum(correct, 0))


def linear_cross_entropy_fwd(
    hidden, weight, bias, labels, normalizer, ignore_index, label_smoothing, softcap, logit_scale,
    reduction, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """(loss, correct, grad_hidden, grad_weight, grad_bias); gradients (0,) if not needed.

    loss is a float32 scalar and correct an int64 scalar. The gradients of the loss have the dtypes
    of their inputs. No label that counts: the loss and the gradients are 0.
    """
    (N, _), V = hidden.shape, weight.shape[0]
    device = hidden.device
    if N == 0:
        return (
            torch.zeros((), dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0),
            torch.zeros_like(weight) if need_weight else hidden.new_empty(0),
            torch.zeros_like(bias) if need_bias else hidden.new_empty(0),
        )
    problem = head.Head(
        hidden, weight, bias, labels, None, 1.0, softcap, logit_scale,
        *head.live_rows(labels != ignore_index),
    )  # fmt: skip
    factor = torch.ones((), dtype=torch.float32, device=device)
    if reduction == MEAN:
        counted = problem.count.clamp(min=1) if normalizer is None else normalizer
        factor = factor / counted
    losses = hidden.new_empty((N,), dtype=torch.float32)
    right = hidden.new_empty((N,), dtype=torch.int32)
    lse = hidden.new_empty((N, 2), dtype=torch.float32)
    gradients, step, width, logits = None, N, 0, None
    if need_weight:
        width = head.tile_columns(problem)
    elif need_hidden or need_bias:  # few rows at a time, whose logits are kept
        step, width = head.rows_with_logits(problem), head.padded_columns(problem)
        logits = hidden.new_empty((step, width), dtype=torch.float32)
    if width:
        tiles_added = triton.cdiv(V, width)
        gradients = head.Gradients.of(problem, need_hidden, need_weight, need_bias, tiles_added)
    downhill = torch.full((), -1.0, dtype=torch.float32, device=device).expand(N)
    extra = head.SUM if label_smoothing else head.NO_EXTRA
    for begin in range(0, N, step):
        end = min(begin + step, N)
        found = head.head_statistics(problem, begin, end, extra, True, logits)
        with rows.device_of(hidden):
            _linear_cross_entropy_fwd_kernel[(triton.cdiv(end - begin, ROWS),)](
                found.partials, found.best, found.token_z, labels, problem.live, problem.count,
                losses, right, lse, begin, end, found.splits, V, label_smoothing, BLOCK=ROWS,
                EXTRA=extra, num_warps=4,
            )  # fmt: skip
        if gradients is not None:
            head.head_gradients(
                problem, begin, end, width, logits, lse, None, downhill, None, label_smoothing,
                head.Factors.one(factor, N), gradients,
            )  # fmt: skip
    loss, correct = hidden.new_empty((), dtype=torch.float32), problem.count.long()
    with rows.device_of(hidden):
        _sum_losses_kernel[(1,)](
            losses, right, problem.count, factor, loss, correct, BLOCK=SUMMED, num_warps=4
        )
    if gradients is None:
        return loss, correct, *(hidden.new_empty(0) for _ in range(3))
    return loss, correct, *gradients.results(problem)
