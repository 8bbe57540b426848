"""bradley_terry_loss in Triton: loss and gradients of all pairs in one launch."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows
from apt_kernels.triton.dpo_loss import MEAN, NONE, pair_block
from apt_kernels.triton.logistic import log_sigmoid, sigmoids


@triton.jit
def _pair_losses(chosen_ptr, rejected_ptr, margins_ptr, index, live, margin, center_coef):
    """Of every pair the loss and its derivatives at both rewards; dead lanes cost 0."""
    c = tl.load(chosen_ptr + index, mask=live, other=0.0).to(tl.float32)
    r = tl.load(rejected_ptr + index, mask=live, other=0.0).to(tl.float32)
    x = c - r - margin
    if margins_ptr is not None:
        x -= tl.load(margins_ptr + index, mask=live, other=0.0).to(tl.float32)
    _, wrong = sigmoids(x)
    total = tl.where(center_coef == 0, 0.0, c + r)  # 0 * inf would be NaN
    loss = -log_sigmoid(x) + center_coef * total * total
    pull = 2.0 * center_coef * total
    return tl.where(live, loss, 0.0), pull - wrong, pull + wrong


# What: -log sigmoid(c - r - margin) + center_coef (c + r)^2 of a pair, and its gradients.
# Passes: one; program 0 also reads the other programs' pairs, to sum the losses in a fixed order
# without atomics or a second launch. Bytes: 2 or 3 inputs a pair read, 2 (3) floats written.
# Parallelism: a block of pairs a program. Accuracy: float32, logarithms without cancellation.
@triton.jit(do_not_specialize=["B"])
def _bradley_terry_loss_fwd_kernel(
    chosen_ptr, rejected_ptr, margins_ptr, loss_ptr, grads_ptr,
    B: tl.int64, margin: tl.float32, center_coef: tl.float32, scale: tl.float32,
    REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < B
    loss, slope_c, slope_r = _pair_losses(
        chosen_ptr, rejected_ptr, margins_ptr, index, live, margin, center_coef
    )
    tl.store(grads_ptr + index, slope_c * scale, mask=live)
    tl.store(grads_ptr + B + index, slope_r * scale, mask=live)
    if REDUCED:
        if tl.program_id(0) == 0:
            total = loss
            for start in range(BLOCK, B, BLOCK):
                other = start + tl.arange(0, BLOCK)
                more, _, _ = _pair_losses(
                    chosen_ptr, rejected_ptr, margins_ptr, other, other < B, margin, center_coef
                )
                total += more
            tl.store(loss_ptr, tl.sum(total, 0) * scale)
    else:
        tl.store(loss_ptr + index, loss, mask=live)


def bradley_terry_loss_fwd(chosen, rejected, margins, margin, center_coef, reduction):
    """(loss, grads (2,B)), both float32."""
    B = chosen.shape[0]
    empty = {"dtype": torch.float32, "device": chosen.device}
    grads = torch.empty((2, B), **empty)
    if B == 0:
        return torch.zeros((0,) if reduction == NONE else (), **empty), grads
    loss = torch.empty((B,) if reduction == NONE else (), **empty)
    block, warps = pair_block(B)
    with rows.device_of(chosen):
        _bradley_terry_loss_fwd_kernel[(triton.cdiv(B, block),)](
            chosen, rejected, margins, loss, grads, B, margin, center_coef,
            1.0 / B if reduction == MEAN else 1.0,
            REDUCED=reduction != NONE, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, grads
