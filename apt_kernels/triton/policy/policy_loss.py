"""policy_loss in Triton: loss, metrics and gradients; a tile of a row in each program."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.logistic import sigmoids
from apt_kernels.triton.common.token_windows import (
    BLOCK,
    WARPS,
    bounded,
    exp_minus,
    finish,
    kl_term,
    live_flags,
    mean_log_ratios,
    put,
    read,
    row_layout,
    tiles_of,
    window,
    write,
)

CLIP = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
K3 = tl.constexpr(3)
UNBIASED_K3 = tl.constexpr(4)  # times the ratio
SEQUENCE = 1  # ratio_level

QUANTITIES = 8  # the metrics, in their order, and the loss; then the number of tokens
WIDTH = 16  # of a tile's sums
LOSSES = 0b10000001  # of these; the others are means over tokens


@triton.jit
def _surrogate(
    logps, ratio, adv, slope, low, high, dual_clip, sapo_temperature_pos, sapo_temperature_neg,
    LOSS: tl.constexpr,
):  # fmt: skip
    """The surrogate of a token, its derivative, and where the ratio was held by both clips.

    low and high are 1 - clip_low and 1 + clip_high; slope is the derivative of the ratio at logps.
    """
    zero = ratio * 0.0
    if LOSS == CLIP:
        negative = adv < 0
        floor = tl.where(negative, low, float("-inf"))
        ceiling = tl.where(negative, dual_clip, high)
        held = tl.where(ratio < floor, floor, tl.where(ratio > ceiling, ceiling, ratio))
        loss = -adv * held
        grad = tl.where((ratio < floor) | (ratio > ceiling), 0.0, -adv * slope)
        beyond = ((adv > 0) & (ratio > high)) | (negative & (ratio < low))
        clipped = tl.where(beyond, 1.0, zero)
        dual_clipped = tl.where(negative & (ratio > ceiling), 1.0, zero)
    elif LOSS == CISPO:
        grad = -adv * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        loss = grad * logps
        clipped = tl.where((ratio < low) | (ratio > high), 1.0, zero)
        dual_clipped = zero
    elif LOSS == SAPO:
        tau = tl.where(adv > 0, sapo_temperature_pos, sapo_temperature_neg)
        right, wrong = sigmoids(tau * (ratio - 1.0))
        loss = -adv * (4.0 / tau) * right
        grad = -adv * (4.0 * right * wrong) * slope
        clipped = zero
        dual_clipped = zero
    else:
        loss = -adv * logps
        grad = -adv
        clipped = zero
        dual_clipped = zero
    return loss, grad, clipped, dual_clipped


@triton.jit
def _kl_penalty(d, ratio, slope, ESTIMATOR: tl.constexpr):
    """The KL term of a token from d = logps - ref_logps, and its derivative at logps."""
    kl, grad = kl_term(d, K3 if ESTIMATOR == UNBIASED_K3 else ESTIMATOR)
    if ESTIMATOR == UNBIASED_K3:
        grad = ratio * grad + slope * kl
        kl *= ratio
    return kl, grad


@triton.jit
def _weighted(coefficient, x):
    """coefficient * x; a coefficient of 0 leaves x out, for 0 * infinity would be NaN."""
    return tl.where(coefficient == 0, 0.0, coefficient * x)


@triton.jit
def _sum(values, counts):
    # float64, as losses of opposite signs cancel in the sum; 8 additions a token cost nothing
    return tl.sum(tl.where(counts, values, 0.0).to(tl.float64), 0)


# What: the losses of a tile of tokens, the gradients of their sum and the sums of the metrics.
# Passes: one, for ratios of sequences after one over mask and log-ratios.
# Bytes: each input once, the gradients written. Parallelism: a tile of a row a program.
# Accuracy: float32 a token, sums in float64 in a fixed order.
@triton.jit(do_not_specialize=["B", "T", "logps_b", "old_logps_b", "advantages_b", "mask_b",
                               "rollout_weights_b", "ref_logps_b", "entropy_b"])  # fmt: skip
def _policy_loss_fwd_kernel(
    inputs, outputs, B: tl.int64, T: tl.int64, logps_b: tl.int64, old_logps_b: tl.int64,
    advantages_b: tl.int64, mask_b: tl.int64, rollout_weights_b: tl.int64, ref_logps_b: tl.int64,
    entropy_b: tl.int64, coefficients,
    LOSS: tl.constexpr, ESTIMATOR: tl.constexpr, ADVANTAGES_STEP: tl.constexpr,
    WEIGHTS_STEP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    (logps_ptr, old_logps_ptr, advantages_ptr, mask_ptr, rollout_weights_ptr, ref_logps_ptr,
     entropy_ptr, means_ptr) = inputs  # fmt: skip
    sums_ptr, grad_logps_ptr, grad_entropy_ptr = outputs
    (low, high, dual_clip, sapo_temperature_pos, sapo_temperature_neg, kl_coef,
     entropy_coef) = coefficients  # fmt: skip
    T *= UNIT if UNIT else 1
    tokens = window(tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), B, T, UNIT, BLOCK)
    counts = live_flags(mask_ptr, mask_b, tokens, UNIT)
    logps = read(logps_ptr, logps_b, tokens, counts, 1, UNIT)
    advantages = read(advantages_ptr, advantages_b, tokens, counts, ADVANTAGES_STEP, UNIT)
    log_ratio = logps * 0.0
    if old_logps_ptr is not None:
        log_ratio = logps - read(old_logps_ptr, old_logps_b, tokens, counts, 1, UNIT)
    x = bounded(log_ratio)
    e = tl.exp(x)
    ratio = e
    slope = tl.where(x == log_ratio, e, 0.0)
    if means_ptr is not None:  # the ratio of the whole row
        mean = tl.load(means_ptr + tl.program_id(0))
        of_row = bounded(mean)
        ratio = tl.exp(of_row) + x * 0.0
        slope = tl.where(of_row == mean, ratio, 0.0)
    loss, grad, clipped, dual_clipped = _surrogate(
        logps, ratio, advantages, slope, low, high, dual_clip, sapo_temperature_pos,
        sapo_temperature_neg, LOSS,
    )  # fmt: skip
    if rollout_weights_ptr is not None:
        weight = read(rollout_weights_ptr, rollout_weights_b, tokens, counts, WEIGHTS_STEP, UNIT)
        loss *= weight
        grad *= weight
    kl = logps * 0.0
    if ref_logps_ptr is not None:
        ref_logps = read(ref_logps_ptr, ref_logps_b, tokens, counts, 1, UNIT)
        kl, kl_grad = _kl_penalty(logps - ref_logps, ratio, slope, ESTIMATOR)
        grad += _weighted(kl_coef, kl_grad)
    entropy = logps * 0.0
    if entropy_ptr is not None:
        entropy = read(entropy_ptr, entropy_b, tokens, counts, 1, UNIT)
    write(grad_logps_ptr, T, tokens, tl.where(counts, grad, 0.0), UNIT)
    if grad_entropy_ptr is not None:
        write(grad_entropy_ptr, T, tokens, tl.where(counts, -entropy_coef, 0.0), UNIT)
    approx_kl, _ = exp_minus(x, e)
    losses, penalties, entropies = _sum(loss, counts), _sum(kl, counts), _sum(entropy, counts)
    total = losses + _weighted(kl_coef, penalties) - _weighted(entropy_coef, entropies)
    sums = put(tl.zeros((WIDTH,), tl.float64), 0, losses)
    sums = put(sums, 1, _sum(approx_kl, counts))
    sums = put(sums, 2, _sum(-x, counts))
    sums = put(sums, 3, _sum(clipped, counts))
    sums = put(sums, 4, _sum(dual_clipped, counts))
    sums = put(sums, 5, penalties)
    sums = put(sums, 6, entropies)
    sums = put(sums, 7, total)
    sums = put(sums, 8, tl.sum(counts.to(tl.float32), 0).to(tl.float64))
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + place * WIDTH + tl.arange(0, WIDTH), sums)


def policy_loss_fwd(
    logps, old_logps, advantages, mask, rollout_weights, ref_logps, entropy, normalizer, loss_type,
    ratio_level, kl_estimator, aggregation, clip_low, clip_high, dual_clip, sapo_temperature_pos,
    sapo_temperature_neg, kl_coef, entropy_coef, need_entropy,
):  # fmt: skip
    """(loss 0-dim, metrics (7,), grad_logps (B,T), grad_entropy (B,T) or (0,), scales (B,1)).

    All are float32. Each row of the gradients is still to be multiplied by its scale.
    """
    B, T = logps.shape
    grad_logps = logps.new_empty((B, T), dtype=torch.float32)
    grad_entropy = logps.new_empty((B, T) if need_entropy else (0,), dtype=torch.float32)
    if B == 0 or T == 0:
        zeros = logps.new_zeros(QUANTITIES, dtype=torch.float32)
        scales = zeros.new_ones((B, 1))
        return zeros[QUANTITIES - 1].clone(), zeros[:-1].clone(), grad_logps, grad_entropy, scales
    means = mean_log_ratios(mask, logps, old_logps) if ratio_level == SEQUENCE else None
    inputs = (logps, old_logps, advantages, mask, rollout_weights, ref_logps, entropy)
    unit, strides = row_layout(T, *inputs)
    tiles = tiles_of(T, unit)
    sums = logps.new_empty((B, tiles, WIDTH), dtype=torch.float64)
    coefficients = (
        1.0 - clip_low, 1.0 + clip_high, dual_clip, sapo_temperature_pos, sapo_temperature_neg,
        kl_coef, entropy_coef,
    )  # fmt: skip
    with rows.device_of(logps):
        _policy_loss_fwd_kernel[(B, tiles)](
            (*inputs, means), (sums, grad_logps, grad_entropy if need_entropy else None),
            B, T // max(unit, 1), *strides, coefficients,
            LOSS=loss_type, ESTIMATOR=kl_estimator, ADVANTAGES_STEP=advantages.dim() - 1,
            WEIGHTS_STEP=0 if rollout_weights is None else rollout_weights.dim() - 1,
            UNIT=unit, BLOCK=BLOCK, WIDTH=WIDTH,
            num_warps=4 if unit == 1 else WARPS,  # ptxas gives 8 too few registers for single loads
        )  # fmt: skip
    totals, scales = finish(sums, normalizer, aggregation, LOSSES, QUANTITIES, T)
    return totals[-1].clone(), totals[:-1].clone(), grad_logps, grad_entropy, scales
