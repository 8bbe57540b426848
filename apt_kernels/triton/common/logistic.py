"""The logistic functions of the pair losses, accurate where the plain formulas cancel.

Triton has no log1p or expm1, and the functions of libdevice do not run in the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(e):
    """log(1 + e) for e in [-1/2, 1], to about 2 ulp, from 2 atanh(s), s = e / (2 + e)."""
    s = e / (2.0 + e)
    q = s * s  # at most 1/9: the first term left out is below 4e-9
    p = 1.0 / 15.0
    p = p * q + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    return 2.0 * (s + s * (q * p))


@triton.jit
def log1p_polynomial(e):
    """log(1 + e) for e in [0, 1], to about 1 ulp; fewer registers than `log1p` (no division)."""
    p = -0.003176057009
    p = p * e + 0.01954252721
    p = p * e - 0.05637361274
    p = p * e + 0.1054362379
    p = p * e - 0.1526966707
    p = p * e + 0.1966327425
    p = p * e - 0.2495161626
    p = p * e + 0.333297105
    p = p * e - 0.4999989265
    p = p * e + 1.0
    return p * e


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), neither by a subtraction from 1."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)); a NaN stays NaN."""
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1_near_zero(x):
    """e^x - 1 for x in [-log 2, 0], by its Taylor series; the next term is below 2e-9."""
    p = 1.0 / 11.0
    for k in tl.static_range(10, 1, -1):
        p = (1.0 + x * p) / k
    return x * (1.0 + x * p)


@triton.jit
def log1mexp(x):
    """log(1 - e^x) and -1 / (1 - e^x) for x < 0 (Maechler 2012), each branch on its own range."""
    near = x > -0.6931471805599453
    one_minus = -expm1_near_zero(tl.where(near, x, -0.5))
    e = tl.exp(tl.where(near, -1.0, x))
    value = tl.where(near, tl.log(one_minus), log1p(-e))
    return value, -1.0 / tl.where(near, one_minus, 1.0 - e)
