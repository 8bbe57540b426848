"""Shared by the row-streaming kernels: aligned windows of a row, the soft cap, the online softmax.

A row of an odd vocabulary (50257, 32003 columns) begins anywhere, and a compiler that cannot see a
16-byte boundary loads it in single elements. So a row is cut in three: a head of fewer than
ALIGN elements up to the first boundary, a body of whole 16-byte vectors, and a tail of fewer than
ALIGN elements. Head and tail go together through one small masked load, `edge`; nothing outside
the row is ever touched.
"""

import torch
import triton
import triton.language as tl

VECTOR_BYTES = 16  # the widest load of one thread on NVIDIA and AMD GPUs
WARP_SIZE = 64 if torch.version.hip else 32


def device_of(tensor):
    """The context in which a launch goes to the tensor's device; nothing changes for the CPU."""
    return torch.cuda.device_of(tensor)


def float32_products():
    """How float32 is multiplied: as PyTorch is told to, and otherwise to float32's own accuracy.

    Three TF32 products per product keep that accuracy on NVIDIA's tensor cores; AMD's multiply
    float32 as it is.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def row_span(row_ptr, columns, ALIGN: tl.constexpr):
    """The lengths (head, body) of a row that begins at row_ptr; ALIGN elements are 16 bytes."""
    BYTES: tl.constexpr = 16 // ALIGN
    misaligned = (row_ptr.to(tl.int64) & 15).to(tl.int32) // BYTES
    head = tl.minimum((ALIGN - misaligned) % ALIGN, columns)
    body = (columns - head) // ALIGN * ALIGN
    return head, body


@triton.jit
def row_edge(head, body, columns, ALIGN: tl.constexpr):
    """The columns of head and tail as one vector of 2 ALIGN lanes, and which lanes count."""
    lane = tl.arange(0, 2 * ALIGN)
    column = tl.where(lane < ALIGN, lane, head + body + lane - ALIGN)
    return column, tl.where(lane < ALIGN, lane < head, column < columns)


@triton.jit
def tanh_and_slope(y):
    """tanh(y) and 1 - tanh(y)^2, both to a few ulp, without libdevice.

    1 - 2/(e^2a + 1) loses all digits as a goes to 0, so an odd polynomial (relative error 3e-9 on
    [0, 0.6]) stands in for it there; for large a the slope comes from w = 1 - tanh, which keeps
    the digits that 1 - tanh^2 would cancel.
    """
    a = tl.abs(y)
    w = 2.0 / (tl.exp(2.0 * a) + 1.0)
    s = y * y
    p = -0.0058942875 * s + 0.0207949281
    p = p * s - 0.0537833907
    p = p * s + 0.1333191693
    p = p * s - 0.3333329856
    small = a + a * (s * p)
    near = a < 0.6
    t = tl.where(near, small, 1.0 - w)
    slope = tl.where(near, 1.0 - t * t, w * (2.0 - w))
    return tl.where(y < 0, -t, t), slope


@triton.jit
def reciprocal(t):
    """1 / t as the sum of two floats, so that x / t needs no division and still rounds once."""
    high = tl.div_rn(1.0, t)
    return high, tl.fma(-high, t, 1.0) * high


@triton.jit
def capped_logit(x, softcap):
    """softcap * tanh(x / softcap) and its slope; an excluded column (-inf) stays, with slope 1."""
    t, slope = tanh_and_slope(x * tl.div_rn(1.0, softcap))
    excluded = x == -float("inf")
    return tl.where(excluded, x, softcap * t), tl.where(excluded, 1.0, slope)


@triton.jit
def scaled_logit(x, inverse, inverse_rest, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """cap(x) / temperature and its derivative, given the reciprocal of the temperature."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAPPED:
        x, slope = capped_logit(x, softcap)
    if SCALED:  # -inf * 0 would be NaN
        x = tl.where(x == -float("inf"), x, tl.fma(x, inverse, x * inverse_rest))
        slope *= inverse
    return x, slope


@triton.jit
def online_softmax(m, s, u, z, WITH_ENTROPY: tl.constexpr):
    """Adds the scores z to the running maximum m, s = sum e^(z-m) and u = sum e^(z-m) (z-m).

    The shift is 0 as long as all scores are -inf, for -inf - -inf would be NaN.
    """
    new_m = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    e = tl.exp(z - shift)
    old = tl.exp(m - shift)
    if WITH_ENTROPY:
        moved = tl.where(s > 0, s * (m - shift), 0.0)
        u = (u + moved) * old + tl.sum(tl.where(e > 0, e * (z - shift), 0.0), 0)
    return new_m, s * old + tl.sum(e, 0), u
