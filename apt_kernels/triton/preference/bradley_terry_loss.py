"""bradley_terry_loss in Triton: loss and gradients of all pairs in one launch."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.logistic import log_sigmoid, sigmoids
from apt_kernels.triton.preference.dpo_loss import MEAN, NONE, pair_block


@triton.jit
def _pair_losses(inputs, first, i, live, margin, center_coef):
    """Of the pairs at these pointers the loss and its derivatives at both rewards.

    Those that are not live cost 0; all are where live is None.
    """
    c = tl.load(inputs[0] + first + i, mask=live).to(tl.float32)
    r = tl.load(inputs[1] + first + i, mask=live).to(tl.float32)
    x = c - r - margin
    if inputs[2] is not None:
        x -= tl.load(inputs[2] + first + i, mask=live).to(tl.float32)
    _, wrong = sigmoids(x)
    total = tl.where(center_coef == 0, 0.0, c + r)  # 0 * inf would be NaN
    loss = -log_sigmoid(x) + center_coef * total * total
    if live is not None:
        loss = tl.where(live, loss, 0.0)
    pull = 2.0 * center_coef * total
    return loss, pull - wrong, pull + wrong


@triton.jit
def _pairs(inputs, first, outputs, loss_ptr, i, live, margin, center_coef, scale):
    """One block: stores what it gives a pair, and returns its losses."""
    loss, slope_c, slope_r = _pair_losses(inputs, first, i, live, margin, center_coef)
    tl.store(outputs[0] + i, slope_c * scale, mask=live)
    tl.store(outputs[1] + i, slope_r * scale, mask=live)
    if loss_ptr is not None:
        tl.store(loss_ptr + i, loss, mask=live)
    return loss


# What: -log sigmoid(c - r - margin) + center_coef (c + r)^2 of a pair, and its gradients.
# Passes: one; program 0 also reads the other programs' pairs, to sum the losses in a fixed order
# without atomics or a second launch. Bytes: 2 or 3 inputs a pair read, 2 (3) floats written, 16 a
# load but for the last block. Parallelism: a block of pairs a program. Accuracy: float32,
# logarithms without cancellation.
@triton.jit(do_not_specialize=["B"])
def _bradley_terry_loss_fwd_kernel(
    chosen_ptr, rejected_ptr, margins_ptr, loss_ptr, grads_ptr,
    B: tl.int64, margin: tl.float32, center_coef: tl.float32, scale: tl.float32,
    REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inputs = (chosen_ptr, rejected_ptr, margins_ptr)
    outputs = (grads_ptr + first, grads_ptr + B + first)
    each_ptr = None if REDUCED else loss_ptr + first
    if first + BLOCK <= B:
        loss = _pairs(inputs, first, outputs, each_ptr, i, None, margin, center_coef, scale)
    else:
        live = i < B - first
        loss = _pairs(inputs, first, outputs, each_ptr, i, live, margin, center_coef, scale)
    if REDUCED:
        if tl.program_id(0) == 0:
            whole = tl.maximum(B // BLOCK, 1) * BLOCK
            for start in range(BLOCK, whole, BLOCK):
                more, _, _ = _pair_losses(inputs, start, i, None, margin, center_coef)
                loss += more
            if whole < B:
                more, _, _ = _pair_losses(inputs, whole, i, i < B - whole, margin, center_coef)
                loss += more
            tl.store(loss_ptr, tl.sum(loss, 0) * scale)


def bradley_terry_loss_fwd(
    chosen_rewards, rejected_rewards, margin_tensor, margin, center_coef, reduction
):
    """(loss, grads (2,B)), both float32."""
    B = chosen_rewards.shape[0]
    empty = {"dtype": torch.float32, "device": chosen_rewards.device}
    grads = torch.empty((2, B), **empty)
    if B == 0:
        return torch.zeros((0,) if reduction == NONE else (), **empty), grads
    loss = torch.empty((B,) if reduction == NONE else (), **empty)
    block, warps = pair_block(B)
    with rows.device_of(chosen_rewards):
        _bradley_terry_loss_fwd_kernel[(triton.cdiv(B, block),)](
            chosen_rewards, rejected_rewards, margin_tensor, loss, grads, B, margin, center_coef,
            1.0 / B if reduction == MEAN else 1.0,
            REDUCED=reduction != NONE, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, grads
