"""dpo_loss in Triton: loss, rewards and gradients of all pairs in one launch."""

import math

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.logistic import log1mexp, log_sigmoid, sigmoids

NONE, MEAN, SUM = 0, 1, 2

SIGMOID = tl.constexpr(0)
ROBUST = tl.constexpr(1)
HINGE = tl.constexpr(2)
IPO = tl.constexpr(3)
EXO_PAIR = tl.constexpr(4)
NCA_PAIR = tl.constexpr(5)
BCO_PAIR = tl.constexpr(6)
SPPO_HARD = tl.constexpr(7)
APO_ZERO = tl.constexpr(8)
APO_DOWN = tl.constexpr(9)
DISCOPOP = tl.constexpr(10)
SIMPO = tl.constexpr(11)
ORPO = tl.constexpr(12)
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


def pair_block(B):
    """Pairs that a program takes and its warps: 4 pairs a thread, 16 bytes of float32."""
    return (1024, 8) if B <= 1024 else (2048, 16)


@triton.jit
def _product(a, b):
    """a b, and 0 where a is: b may be infinite there."""
    return tl.where(a == 0.0, 0.0, a * b)


@triton.jit
def _loss_of_difference(d, beta, smoothing, extra, extra_2, LOSS: tl.constexpr):
    """The loss of types that see only d = c - r, and its derivative at d."""
    x = beta * d
    if LOSS == SIMPO:
        x -= extra
    right, wrong = sigmoids(x)
    if LOSS == HINGE:
        loss = tl.where(x >= 1.0, 0.0, 1.0 - x)  # keeps a NaN
        slope = tl.where(x < 1.0, -1.0, 0.0)
    elif LOSS == IPO:
        distance = d - 0.5 / beta
        loss = distance * distance
        slope = 2.0 * distance / beta
    elif LOSS == EXO_PAIR:
        log_right = log_sigmoid(x) - extra
        log_wrong = log_sigmoid(-x) - extra_2
        loss = _product(right, log_right) + _product(wrong, log_wrong)
        slope = _product(right * wrong, log_right - log_wrong)
    elif LOSS == DISCOPOP:
        gate, rest = sigmoids(x / extra)
        # e^-x S(x/t) as one exponential: inf * 0 for very negative x otherwise
        above = tl.where(x < LEAST, LEAST, x)  # -inf + inf would be NaN
        exponential = tl.exp(log_sigmoid(x / extra) - above)
        loss = exponential - log_sigmoid(x) * rest
        slope = (_product(gate, log_sigmoid(x)) + exponential) * (rest / extra) - exponential
        slope -= wrong * rest
    elif LOSS == ROBUST:
        loss = _product(extra_2, log_sigmoid(-x)) - extra * log_sigmoid(x)
        slope = -(extra * wrong + extra_2 * right)
    else:
        loss = -(1.0 - smoothing) * log_sigmoid(x) - _product(smoothing, log_sigmoid(-x))
        slope = smoothing * right - (1.0 - smoothing) * wrong
    return loss, beta * slope


@triton.jit
def _loss_of_each(c, r, beta, LOSS: tl.constexpr):
    """The loss of types that see c and r, and its derivatives at both."""
    right, wrong = sigmoids(beta * c)
    right_r, wrong_r = sigmoids(beta * r)
    if LOSS == NCA_PAIR:
        loss = -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c)
        loss -= 0.5 * log_sigmoid(-beta * r)
        slope_c = beta * (0.5 * right - wrong)
        slope_r = beta * 0.5 * right_r
    elif LOSS == BCO_PAIR:
        loss = -log_sigmoid(beta * c) - log_sigmoid(-beta * r)
        slope_c = -beta * wrong
        slope_r = beta * right_r
    elif LOSS == SPPO_HARD:
        above = c - 0.5 / beta
        below = r + 0.5 / beta
        loss = above * above + below * below
        slope_c = 2.0 * above
        slope_r = 2.0 * below
    elif LOSS == APO_ZERO:
        loss = wrong + right_r
        slope_c = -beta * (right * wrong)
        slope_r = beta * (right_r * wrong_r)
    else:  # APO_DOWN
        right_d, wrong_d = sigmoids(beta * (c - r))
        loss = right + wrong_d
        slope_r = beta * (right_d * wrong_d)
        slope_c = beta * (right * wrong - right_d * wrong_d)
    return loss, slope_c, slope_r


@triton.jit
def _pair_losses(inputs, first, i, live, numbers, LOSS: tl.constexpr):
    """Of the pairs at these pointers c, r, the loss and its derivatives at pc and pr.

    Those that are not live cost 0; all are where live is None.
    """
    beta, smoothing, extra, extra_2 = numbers
    pc = tl.load(inputs[0] + first + i, mask=live).to(tl.float32)
    pr = tl.load(inputs[1] + first + i, mask=live).to(tl.float32)
    c = pc
    r = pr
    if inputs[2] is not None:
        c = pc - tl.load(inputs[2] + first + i, mask=live).to(tl.float32)
    if inputs[3] is not None:
        r = pr - tl.load(inputs[3] + first + i, mask=live).to(tl.float32)
    if LOSS == ORPO:
        log_c, slope_pc = log1mexp(pc)
        log_r, slope_pr = log1mexp(pr)
        odds = (pc - pr) - (log_c - log_r)
        _, wrong = sigmoids(odds)
        loss = -beta * log_sigmoid(odds)
        slope_c = beta * wrong * slope_pc
        slope_r = -beta * wrong * slope_pr
    elif (LOSS >= NCA_PAIR) & (LOSS <= APO_DOWN):
        loss, slope_c, slope_r = _loss_of_each(c, r, beta, LOSS)
    else:
        loss, slope_c = _loss_of_difference(c - r, beta, smoothing, extra, extra_2, LOSS)
        slope_r = -slope_c
    if live is not None:
        loss = tl.where(live, loss, 0.0)
    return c, r, loss, slope_c, slope_r


@triton.jit
def _pairs(inputs, first, outputs, loss_ptr, i, live, numbers, scale, LOSS: tl.constexpr):
    """One block: stores what it gives a pair, and returns its losses."""
    c, r, loss, slope_c, slope_r = _pair_losses(inputs, first, i, live, numbers, LOSS)
    tl.store(outputs[0] + i, numbers[0] * c, mask=live)
    tl.store(outputs[1] + i, numbers[0] * r, mask=live)
    tl.store(outputs[2] + i, slope_c * scale, mask=live)
    tl.store(outputs[3] + i, slope_r * scale, mask=live)
    if loss_ptr is not None:
        tl.store(loss_ptr + i, loss, mask=live)
    return loss


# What: the loss of preference pairs, its gradients at pc and pr, and both rewards.
# Passes: one; program 0 also reads the other programs' pairs, to sum the losses in a fixed order
# without atomics or a second launch. Bytes: 4 inputs a pair read, 4 (5) floats written, 16 a load
# but for the last block. Parallelism: a block of pairs a program. Accuracy: float32, logarithms
# without cancellation.
@triton.jit(do_not_specialize=["B"])
def _dpo_loss_fwd_kernel(
    pc_ptr, pr_ptr, rc_ptr, rr_ptr, loss_ptr, chosen_rewards_ptr, rejected_rewards_ptr, grads_ptr,
    B: tl.int64, beta: tl.float32, smoothing: tl.float32, extra: tl.float32, extra_2: tl.float32,
    scale: tl.float32,
    LOSS: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inputs = (pc_ptr, pr_ptr, rc_ptr, rr_ptr)
    numbers = (beta, smoothing, extra, extra_2)
    grads_ptr += first
    outputs = (chosen_rewards_ptr + first, rejected_rewards_ptr + first, grads_ptr, grads_ptr + B)
    each_ptr = None if REDUCED else loss_ptr + first
    if first + BLOCK <= B:
        loss = _pairs(inputs, first, outputs, each_ptr, i, None, numbers, scale, LOSS)
    else:
        loss = _pairs(inputs, first, outputs, each_ptr, i, i < B - first, numbers, scale, LOSS)
    if REDUCED:
        if tl.program_id(0) == 0:
            whole = tl.maximum(B // BLOCK, 1) * BLOCK
            for start in range(BLOCK, whole, BLOCK):
                _, _, more, _, _ = _pair_losses(inputs, start, i, None, numbers, LOSS)
                loss += more
            if whole < B:
                _, _, more, _, _ = _pair_losses(inputs, whole, i, i < B - whole, numbers, LOSS)
                loss += more
            tl.store(loss_ptr, tl.sum(loss, 0) * scale)


def _constants(loss_type, label_smoothing, discopop_tau, simpo_gamma):
    """The two numbers of a type beside beta and the smoothing.

    float32 would lose the digits of 1 - 2 * label_smoothing.
    """
    if loss_type == ROBUST.value:
        wrong = 1.0 - 2.0 * label_smoothing
        return (1.0 - label_smoothing) / wrong, label_smoothing / wrong
    if loss_type == EXO_PAIR.value:
        return math.log1p(-label_smoothing), math.log(label_smoothing)
    if loss_type == DISCOPOP.value:
        return discopop_tau, 0.0
    return (simpo_gamma, 0.0) if loss_type == SIMPO.value else (0.0, 0.0)


def dpo_loss_fwd(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    loss_type,
    reduction,
    beta,
    label_smoothing,
    discopop_tau,
    simpo_gamma,
):
    """(loss, chosen_rewards (B,), rejected_rewards (B,), grads (2,B)), all float32."""
    B = policy_chosen_logps.shape[0]
    empty = {"dtype": torch.float32, "device": policy_chosen_logps.device}
    chosen_rewards, rejected_rewards = torch.empty(B, **empty), torch.empty(B, **empty)
    grads = torch.empty((2, B), **empty)
    if B == 0:
        loss = torch.zeros((0,) if reduction == NONE else (), **empty)
        return loss, chosen_rewards, rejected_rewards, grads
    loss = torch.empty((B,) if reduction == NONE else (), **empty)
    block, warps = pair_block(B)
    with rows.device_of(policy_chosen_logps):
        _dpo_loss_fwd_kernel[(triton.cdiv(B, block),)](
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, loss,
            chosen_rewards, rejected_rewards, grads, B, beta, label_smoothing,
            *_constants(loss_type, label_smoothing, discopop_tau, simpo_gamma),
            1.0 / B if reduction == MEAN else 1.0,
            LOSS=loss_type, REDUCED=reduction != NONE, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, chosen_rewards, rejected_rewards, grads
