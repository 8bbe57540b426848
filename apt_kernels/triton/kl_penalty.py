"""kl_penalty in Triton: the estimate of every token, and its gradient."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows
from apt_kernels.triton.tokens import BLOCK, kl_term


# What: an estimate of KL(policy || reference) at each token, or its gradient.
# Passes: one. Bytes: log-probabilities, the mask (and the upstream gradient) read, 4 written.
# Parallelism: a block of tokens a program. Accuracy: float32 without cancellation.
@triton.jit(do_not_specialize=["N"])
def _kl_penalty_kernel(
    grad_ptr, logps_ptr, ref_logps_ptr, mask_ptr, out_ptr, N: tl.int64,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    counts = live
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + i, mask=live, other=0) != 0
    logps = tl.load(logps_ptr + i, mask=counts, other=0.0).to(tl.float32)
    ref_logps = tl.load(ref_logps_ptr + i, mask=counts, other=0.0).to(tl.float32)
    out, slope = kl_term(logps - ref_logps, ESTIMATOR)
    if grad_ptr is not None:
        out = tl.load(grad_ptr + i, mask=counts, other=0.0) * slope
    tl.store(out_ptr + i, tl.where(counts, out, 0.0), mask=live)


def kl_penalty_fwd(logps, ref_logps, mask, estimator):
    """The penalty in the shape of logps, float32."""
    return _run(None, logps, ref_logps, mask, estimator)


def kl_penalty_bwd(grad, logps, ref_logps, mask, estimator):
    """grad_logps in the shape of logps, float32."""
    return _run(grad, logps, ref_logps, mask, estimator)


def _run(grad, logps, ref_logps, mask, estimator):
    out = logps.new_empty(logps.shape, dtype=torch.float32)
    N = logps.numel()
    if N == 0:
        return out
    with rows.device_of(logps):
        _kl_penalty_kernel[(triton.cdiv(N, BLOCK),)](
            grad, logps, ref_logps, mask, out, N, ESTIMATOR=estimator, BLOCK=BLOCK, num_warps=4
        )
    return out
