"""sup_con_loss in Triton: several positives a row, each pair multiplied once forward."""

import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.contrastive.similarity import NOWHERE, scale_of, side
from apt_kernels.triton.contrastive.similarity_gradient import SUP_CON, gradient
from apt_kernels.triton.contrastive.similarity_softmax import softmax_statistics

BLOCK = 128
STATS = 3  # of a row: the largest d, 1 / positives or 0, log of the sum


# What: losses, accuracy, slopes and stats of rows from the statistics of their classes.
# Passes: one. Bytes: 28 a row read, 24 written. Parallelism: blocks of rows. Accuracy: float32.
@triton.jit(do_not_specialize=["N"])
def _sup_con_results_kernel(
    running_ptr, temperature_ptr, losses_ptr, right_ptr, slopes_ptr, stats_ptr, N: tl.int32,
    scale: tl.float32, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = scale_of(temperature_ptr, scale)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    plane = N.to(tl.int64)
    m = tl.load(running_ptr + row, mask=live, other=0.0)
    total = tl.load(running_ptr + plane + row, mask=live, other=1.0)
    weighted = tl.load(running_ptr + 2 * plane + row, mask=live, other=0.0)
    best = tl.load(running_ptr + 3 * plane + row, mask=live, other=0.0)
    best_negative = tl.load(running_ptr + 4 * plane + row, mask=live, other=0.0)
    positives = tl.load(running_ptr + 5 * plane + row, mask=live, other=0.0)
    number = tl.load(running_ptr + 6 * plane + row, mask=live, other=0.0)
    anchor = number > 0
    share = tl.where(anchor, 1.0 / tl.where(anchor, number, 1.0), 0.0)
    gap = m - positives / tl.where(anchor, number, 1.0)
    log_sum = tl.log(total)
    loss = tl.where(anchor, gap * scale + log_sum, 0.0)
    tl.store(losses_ptr + row, loss, mask=live)
    right = anchor & (best > best_negative) & (loss == loss)  # maxima do not see NaN
    tl.store(right_ptr + row, tl.where(right, 1.0, 0.0), mask=live)
    if slopes_ptr is not None:
        tl.store(slopes_ptr + row, tl.where(anchor, gap + weighted / total, 0.0), mask=live)
    at = stats_ptr + row.to(tl.int64) * WIDTH
    tl.store(at, tl.where(anchor, m, 0.0), mask=live)
    tl.store(at + 1, share, mask=live)
    tl.store(at + 2, tl.where(anchor, log_sum, 0.0), mask=live)


def sup_con_loss_fwd(
    features, labels, classes, class_labels, temperature_tensor, temperature, normalize,
    self_offset, need_slopes, before=None,
):  # fmt: skip
    """(losses (N,), right (N,), slopes (N,)|(0,), stats (N,3), after (N,7)|(0,)).

    before, after: statistics of the rows.
    """
    a = side(features, normalize)
    b = a if classes is None else side(classes, normalize)
    running, _, _, _ = softmax_statistics(
        a, b, temperature_tensor, temperature, label_offset=NOWHERE, self_offset=self_offset,
        triangle=classes is None, slopes=need_slopes, labels=labels,
        column_labels=labels if classes is None else class_labels, before=before,
    )  # fmt: skip
    N = a.count
    losses, right = running.new_empty(N), running.new_empty(N)
    slopes = running.new_empty(N if need_slopes else 0)
    stats = running.new_empty((N, STATS))
    if N:
        with rows.device_of(features):
            _sup_con_results_kernel[(triton.cdiv(N, BLOCK),)](
                running, temperature_tensor, losses, right, slopes if need_slopes else None,
                stats, N, 1.0 / temperature, WIDTH=STATS, BLOCK=BLOCK,
            )  # fmt: skip
    after = running.mT if before is not None else running.new_empty(0)
    return losses, right, slopes, stats, after.double().contiguous()


def sup_con_loss_bwd(
    grad_losses, grad_class_losses, features, labels, classes, class_labels, temperature_tensor,
    temperature, normalize, self_offset, stats, class_stats, unrounded=False,
):  # fmt: skip
    """grad_features (N,D), contiguous, in the dtype of the features; `unrounded` in float32."""
    a = side(features, normalize)
    b, column_weights, column_stats, column_labels = a, grad_losses, stats, labels
    if classes is not None:
        b = side(classes, normalize)
        column_weights, column_stats, column_labels = grad_class_losses, class_stats, class_labels
    return gradient(
        a, b, grad_losses, stats, column_weights, column_stats, temperature_tensor, temperature,
        label_offset=NOWHERE, self_offset=self_offset, loss=SUP_CON, labels=labels,
        column_labels=column_labels, unrounded=unrounded,
    )  # fmt: skip
