"""kl_penalty in Triton: the estimate of every token, and its gradient."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.token_windows import BLOCK, kl_term


@triton.jit
def _penalty(grad_ptr, logps_ptr, ref_logps_ptr, mask_ptr, out_ptr, live, ESTIMATOR: tl.constexpr):
    """One block, at these pointers; all of it where live is None."""
    logps = tl.load(logps_ptr, mask=live).to(tl.float32)
    ref_logps = tl.load(ref_logps_ptr, mask=live).to(tl.float32)
    out, slope = kl_term(logps - ref_logps, ESTIMATOR)
    if grad_ptr is not None:
        out = tl.load(grad_ptr, mask=live) * slope
    if mask_ptr is not None:
        out = tl.where(tl.load(mask_ptr, mask=live) != 0, out, 0.0)
    tl.store(out_ptr, out, mask=live)


# What: an estimate of KL(policy || reference) at each token, or its gradient.
# Passes: one. Bytes: log-probabilities, the mask (and the upstream gradient) read, 4 written, 16 a
# load but for the last block. Parallelism: a block of tokens a program. Accuracy: float32 without
# cancellation.
@triton.jit(do_not_specialize=["N"])
def _kl_penalty_kernel(
    grad_ptr, logps_ptr, ref_logps_ptr, mask_ptr, out_ptr, N: tl.int64,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if grad_ptr is not None:
        grad_ptr += i
    if mask_ptr is not None:
        mask_ptr += i
    if start + BLOCK <= N:
        _penalty(grad_ptr, logps_ptr + i, ref_logps_ptr + i, mask_ptr, out_ptr + i, None, ESTIMATOR)
    else:
        _penalty(
            grad_ptr, logps_ptr + i, ref_logps_ptr + i, mask_ptr, out_ptr + i, i < N, ESTIMATOR
        )


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
