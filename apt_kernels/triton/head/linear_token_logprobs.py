"""linear_token_logprobs in Triton: token log-probabilities from hidden states; no logits in memory.

Products, in units of rows x D x V multiply-adds, counting only rows whose mask is true (the
number needed in brackets): forward 1 [1]; with grad_hidden formed in the forward pass 2 [2];
backward 3 [3] for hidden and weight, of which one recomputes the logits; 2 for either alone.
"""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.head import launch as head
from apt_kernels.triton.head.logits import live_rows, merged_statistics

ROWS = 128  # rows of a program that merges statistics


# What: log-probability, entropy and log-sum-exp of live rows from the statistics of column parts.
# Passes: one over the statistics. Bytes: 8 or 12 a row and part. Parallelism: 128 rows a program.
# Accuracy: float32.
@triton.jit(do_not_specialize=["row_begin", "row_end", "splits", "V"])
def _linear_token_logprobs_fwd_kernel(
    partials_ptr, token_z_ptr, ids_ptr, rows_ptr, count_ptr, logps_ptr, entropy_ptr, lse_ptr,
    row_begin: tl.int32, row_end: tl.int32, splits: tl.int32, V: tl.int32,
    BLOCK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    first = row_begin + tl.program_id(0) * BLOCK
    place, row, live, end = live_rows(rows_ptr, count_ptr, first, row_end, BLOCK)
    if first >= end:
        return
    at = place - row_begin
    count = (row_end - row_begin).to(tl.int64)
    m, s, u = merged_statistics(partials_ptr, at, live, count, splits, EXTRA)
    log_s = tl.log(s)
    token = tl.load(ids_ptr + row, mask=live, other=-1)
    inside = (token >= 0) & (token < V)
    z = tl.load(token_z_ptr + at, mask=live & inside, other=0.0)
    tl.store(logps_ptr + row, tl.where(inside, z - m - log_s, float("nan")), mask=live)
    tl.store(lse_ptr + row * 2, m, mask=live)
    tl.store(lse_ptr + row * 2 + 1, log_s, mask=live)
    if EXTRA == 1:
        tl.store(entropy_ptr + row, log_s - u / s, mask=live)


def linear_token_logprobs_fwd(
    hidden, weight, bias, token_ids, mask, temperature_tensor, temperature, softcap, logit_scale,
    return_entropy, form_grad_hidden,
):  # fmt: skip
    """(logps (N,), entropy (N,) or (0,), lse (N,2), grad_hidden (N,D) or (0,)).

    All float32 but grad_hidden, which is d logps / d hidden in the dtype of hidden; masked rows
    are 0. lse is the pair (maximum, log of the sum of e^(z - maximum)).
    """
    N, _ = hidden.shape
    new = {"dtype": torch.float32, "device": hidden.device}
    fill = torch.empty if mask is None else torch.zeros
    logps, lse = fill(N, **new), fill((N, 2), **new)
    entropy = fill(N if return_entropy else 0, **new)
    if N == 0:
        return logps, entropy, lse, hidden.new_empty(hidden.shape if form_grad_hidden else 0)
    problem = head.Head(
        hidden, weight, bias, token_ids, temperature_tensor, temperature, softcap, logit_scale,
        *head.live_rows(mask),
    )  # fmt: skip
    extra = head.ENTROPY if return_entropy else head.NO_EXTRA
    step, logits, gradients = N, None, None
    if form_grad_hidden:
        step = head.rows_with_logits(problem)
        logits = hidden.new_empty((step, head.padded_columns(problem)), dtype=torch.float32)
        gradients = head.Gradients.of(problem, True, False, False, tiles_added=1)
        one = torch.ones((), **new).expand(N)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        found = head.head_statistics(problem, begin, end, extra, False, logits)
        with rows.device_of(hidden):
            _linear_token_logprobs_fwd_kernel[(triton.cdiv(end - begin, ROWS),)](
                found.partials, found.token_z, token_ids, problem.live, problem.count, logps,
                entropy, lse, begin, end, found.splits, weight.shape[0], BLOCK=ROWS,
                EXTRA=extra, num_warps=4,
            )  # fmt: skip
        if form_grad_hidden:
            head.head_gradients(
                problem, begin, end, logits.shape[1], logits, lse, None, one, None, 0.0, None,
                gradients,
            )  # fmt: skip
    if not form_grad_hidden:
        return logps, entropy, lse, hidden.new_empty(0)
    return logps, entropy, lse, gradients.results(problem)[0]


def linear_token_logprobs_bwd(
    grad_logps, grad_entropy, hidden, weight, bias, token_ids, mask, temperature_tensor, lse,
    entropy, temperature, softcap, logit_scale, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """(grad_hidden, grad_weight, grad_bias) in the dtypes of their inputs, (0,) if not needed."""
    N, _ = hidden.shape
    problem = head.Head(
        hidden, weight, bias, token_ids, temperature_tensor, temperature, softcap, logit_scale,
        *head.live_rows(mask if N else None),
    )  # fmt: skip
    if N == 0 or not (need_hidden or need_weight or need_bias):
        return (
            torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0),
            torch.zeros_like(weight) if need_weight else weight.new_empty(0),
            torch.zeros_like(bias) if need_bias else weight.new_empty(0),
        )
    factors = None
    if hidden.dtype == torch.float16:
        size = grad_logps.abs()
        if grad_entropy is not None:
            size = torch.maximum(size, grad_entropy.abs())
        factors = head.Factors.of(size if mask is None else size.masked_fill(~mask, 0.0))
        grad_logps = grad_logps / factors.of_rows
        grad_entropy = None if grad_entropy is None else grad_entropy / factors.of_rows
    width = head.tile_columns(problem)
    tiles_added = triton.cdiv(weight.shape[0], width)
    gradients = head.Gradients.of(problem, need_hidden, need_weight, need_bias, tiles_added)
    head.head_gradients(
        problem, 0, N, width, None, lse, entropy, grad_logps, grad_entropy, 0.0, factors, gradients,
    )  # fmt: skip
    return gradients.results(problem)
