"""Shared by the losses of tokens: counting, the factor of a row, sums in a fixed order.

A loss takes two launches: the losses of a tile of a row in each program, with sums of the tile, and
`finish`. The denominator of a mean is known only then. So the first launch forms the gradients of
the sum, and `finish` gives the factors of the rows. A ratio of sequences
needs `mean_log_ratios` before.
"""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

BLOCK = 1024  # tokens a program takes
WARPS = 8  # 4 tokens a thread: 16 bytes of float32, so that a warp asks for whole sectors
ROWS_BLOCK = 64  # rows that are finished at a time

TOKEN_MEAN = tl.constexpr(0)
TOKEN_SUM = tl.constexpr(1)
SEQUENCE_MEAN = tl.constexpr(2)
DR_GRPO = tl.constexpr(4)
LOG_RATIO_BOUND = tl.constexpr(20.0)  # e^20 = 4.9e8: beyond it a ratio says nothing


def row_strides(T, *tensors):
    """UNIT, 16 where rows begin and end at multiples of 16 elements, else 1, and the strides in it.

    A kernel that multiplies by UNIT tells the compiler so: vectors of 16 bytes, for all such
    lengths the same code. One number a row has its stride as it is; 0 for None.
    """
    strides = [0 if t is None else t.stride(0) for t in tensors]
    tokens = [t is not None and t.dim() == 2 for t in tensors]
    wide = T % 16 == 0 and all(s % 16 == 0 for s, each in zip(strides, tokens, strict=True) if each)
    unit = 16 if wide else 1
    return unit, [s // unit if each else s for s, each in zip(strides, tokens, strict=True)]


def row_layout(T, *tensors):
    """How kernels find their tokens, UNIT and strides: as row_strides, or UNIT 0, where rows of any
    length follow each other without gaps, in all tensors alike. `window` then cuts each row at
    multiples of 16 elements of the whole tensor, so that vectors stay possible.
    """
    unit, strides = row_strides(T, *tensors)
    tokens = [t for t in tensors if t is not None and t.dim() == 2]
    gaps = any(t.stride(0) != T and t.shape[0] > 1 for t in tokens)
    return (0 if unit == 1 and not gaps else unit), strides


def tiles_of(T, unit):
    """Programs a row: a window may begin up to 15 elements before its row."""
    return triton.cdiv(T if unit else T + 15, BLOCK)


@triton.jit
def window(row, tile, B, T, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The window of a row that a program takes: (row, start, head, end, live, vectors, rest).

    Its tokens, the `live` ones, are those from `head` to `end`, counted from `start`, which is the
    place in the row (with UNIT 0 the place in the tensor, a multiple of 16). With UNIT 0 tokens are
    loaded with their neighbours in whole `vectors`, and `rest` says whether some lie behind the
    last vector of the tensor. `read`, `live_flags` and `write` take the window whole.
    """
    i = tl.arange(0, BLOCK)
    if UNIT == 0:
        first = row * T
        sixteens = first // 16 + tile * (BLOCK // 16)
        start = sixteens * 16
        head = first - start
        end = head + T
        live = (i >= head) & (i < end)
        whole = tl.minimum(B * T // 16 - sixteens, (end + 15) // 16) * 16
        vectors = i < whole
        rest = whole < tl.minimum(end, BLOCK)
    else:
        start = tile * BLOCK
        head = 0
        end = T - start
        live = i < end
        vectors = live
        rest = False
    return row, start, head, end, live, vectors, rest


@triton.jit
def read(ptr, stride, tokens, counts, STEP: tl.constexpr, UNIT: tl.constexpr):
    """One number a token of a window, or one a row (STEP 0); 0 where a token does not count.

    All tokens are loaded, for a load under a mask that comes from memory is not vectorised.
    """
    row, start, _, _, live, vectors, rest = tokens
    i = tl.arange(0, live.shape[0])
    if STEP == 0:
        x = tl.load(ptr + row * stride)
    elif UNIT == 0:
        x = tl.load(ptr + start + i, mask=vectors, other=0.0)
        if rest:
            x = tl.where(vectors, x, tl.load(ptr + start + i, mask=live & ~vectors, other=0.0))
    else:
        x = tl.load(ptr + (row * stride * UNIT + start) + i, mask=live, other=0.0)
    return tl.where(counts, x.to(tl.float32), 0.0)


@triton.jit
def live_flags(mask_ptr, stride, tokens, UNIT: tl.constexpr):
    """Which tokens of a window count."""
    return read(mask_ptr, stride, tokens, tokens[4], 1, UNIT) != 0


@triton.jit
def write(ptr, T, tokens, x, UNIT: tl.constexpr):
    """Writes x to the tokens of a window, in a tensor [B, T] without gaps."""
    row, start, head, end, live, _, _ = tokens
    i = tl.arange(0, live.shape[0])
    if UNIT == 0:  # vectors that lie in the row, and what is left of it at its ends
        low = (head + 15) // 16 * 16
        high = end // 16 * 16
        tl.store(ptr + start + i, x, mask=(i >= low) & (i < high))
        if (head > 0) | (end < live.shape[0]):
            tl.store(ptr + start + i, x, mask=live & ((i < low) | (i >= high)))
    else:
        tl.store(ptr + (row * T + start) + i, x, mask=live)


@triton.jit
def exp_minus(x, e):
    """e^x - 1 - x and e^x - 1 from e = e^x; a Taylor series near 0, where the formulas cancel."""
    p = 1.0 / 12.0  # the next term is under 4e-10 of the sum for |x| < 1
    for k in tl.static_range(11, 2, -1):
        p = (1.0 + x * p) / k
    series = 0.5 * x * x * (1.0 + x * p)
    near = tl.abs(x) < 1.0
    expm1 = tl.where(near, x + series, e - 1.0)
    return tl.where(near, series, expm1 - x), expm1


@triton.jit
def bounded(x):
    """x within +-20; a NaN stays NaN."""
    return tl.where(
        x < -LOG_RATIO_BOUND, -LOG_RATIO_BOUND, tl.where(x > LOG_RATIO_BOUND, LOG_RATIO_BOUND, x)
    )


@triton.jit
def kl_term(d, ESTIMATOR: tl.constexpr):
    """The estimate of the divergence from d, and its derivative at d."""
    if ESTIMATOR == 1:
        value = d
        grad = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        value = 0.5 * d * d
        grad = d
    else:
        x = bounded(-d)
        value, expm1 = exp_minus(x, tl.exp(x))
        grad = tl.where(x == -d, -expm1, 0.0)
    return value, grad


# What: the mean of x - y over the tokens that count in each row, 0 of none. Passes: one.
# Bytes: the mask and two numbers a token read. Parallelism: a row a program.
# Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["T", "mask_b", "x_b", "y_b"])
def _mean_log_ratios_kernel(
    mask_ptr, x_ptr, y_ptr, means_ptr, T: tl.int64, mask_b: tl.int64, x_b: tl.int64, y_b: tl.int64,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT if UNIT else 1
    length = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tl.cdiv(T if UNIT else T + 15, BLOCK)):
        tokens = window(row, tile, tl.num_programs(0), T, UNIT, BLOCK)
        counts = live_flags(mask_ptr, mask_b, tokens, UNIT)
        length += counts.to(tl.float32)
        x = read(x_ptr, x_b, tokens, counts, 1, UNIT)
        total += x - read(y_ptr, y_b, tokens, counts, 1, UNIT)
    tl.store(means_ptr + row, tl.sum(total, 0) / tl.maximum(tl.sum(length, 0), 1.0))


@triton.jit
def put(sums, k, x):
    """The sums of a tile with x as the one of quantity k."""
    return tl.where(tl.arange(0, sums.shape[0]) == k, x, sums)


@triton.jit
def _of_rows(sums_ptr, row, B, tiles, WIDTH: tl.constexpr):
    """The sums of rows [rows, WIDTH] from the sums of their tiles; 0 beyond the last row."""
    total = tl.zeros((row.shape[0], WIDTH), tl.float64)
    for tile in range(0, tiles):
        at = (row * tiles + tile)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        total += tl.load(sums_ptr + at, mask=(row < B)[:, None], other=0.0)
    return total


@triton.jit
def column(x, k, j):
    """Column j of x, of whose columns k are the numbers."""
    return tl.sum(tl.where(k == j, x, 0.0), 1)


# What: out[j] = sum of quantity j: of losses (LOSSES has bit j) with the factor of each row, of the
# others divided by the number of tokens, which is quantity NUMBER. Also the factors of the rows.
# Passes: one over the sums of tiles, two with a mean of each row. One program.
# Accuracy: float64, fixed order.
@triton.jit(do_not_specialize=["B", "T", "tiles"])
def _finish_kernel(
    sums_ptr, normalizer_ptr, scales_ptr, out_ptr, B: tl.int64, T: tl.int64, tiles: tl.int64,
    AGGREGATION: tl.constexpr, LOSSES: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, WIDTH)
    is_loss = ((LOSSES >> j) & 1) != 0
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    full = tl.zeros((ROWS,), tl.float64)
    for start in range(0, B, ROWS):
        part = _of_rows(sums_ptr, start + tl.arange(0, ROWS), B, tiles, WIDTH)
        length = column(part, j[None, :], NUMBER)
        full += (length > 0).to(tl.float64)
        if AGGREGATION == SEQUENCE_MEAN:
            mean = part / tl.maximum(length, 1.0)[:, None]
            part = tl.where(is_loss[None, :], mean, part)
        total += part
    totals = tl.sum(total, 0)
    count = tl.maximum(tl.sum(tl.where(j == NUMBER, totals, 0.0), 0), 1.0)
    filled = tl.maximum(tl.sum(full, 0), 1.0)
    if normalizer_ptr is not None:
        scale = 1.0 / tl.load(normalizer_ptr).to(tl.float64)
    elif AGGREGATION == TOKEN_MEAN:
        scale = 1.0 / count
    elif AGGREGATION == TOKEN_SUM:
        scale = count * 0.0 + 1.0
    elif AGGREGATION == DR_GRPO:
        scale = 1.0 / (filled * T)
    else:
        scale = 1.0 / filled
    tl.store(out_ptr + j, totals * tl.where(is_loss, scale, 1.0 / count), mask=j < NUMBER)
    for begin in range(0, B, ROWS):
        row = begin + tl.arange(0, ROWS)
        factor = tl.zeros((ROWS,), tl.float64) + scale
        if AGGREGATION == SEQUENCE_MEAN:
            part = _of_rows(sums_ptr, row, B, tiles, WIDTH)
            factor /= tl.maximum(column(part, j[None, :], NUMBER), 1.0)
        tl.store(scales_ptr + row, factor, mask=row < B)


def mean_log_ratios(mask, logps, old_logps):
    """The mean of logps - old_logps over the tokens of each row, (B,) float32; old None: 0."""
    B, T = mask.shape
    if old_logps is None:
        return logps.new_zeros(B, dtype=torch.float32)
    means = logps.new_empty(B, dtype=torch.float32)
    unit, strides = row_layout(T, mask, logps, old_logps)
    with rows.device_of(mask):
        _mean_log_ratios_kernel[(B,)](
            mask, logps, old_logps, means, T // max(unit, 1), *strides,
            UNIT=unit, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return means


def finish(sums, normalizer, aggregation, losses, number, T):
    """(totals (number,), factors of the rows (B,1)), float32, from sums of tiles [B, tiles, WIDTH].

    losses: bit j: quantity j is a loss. number: which quantity is the number of tokens.
    """
    B, tiles, width = sums.shape
    out = sums.new_empty(number, dtype=torch.float32)
    scales = sums.new_empty((B, 1), dtype=torch.float32)
    with rows.device_of(sums):
        _finish_kernel[(1,)](
            sums, normalizer, scales, out, B, T, tiles,
            AGGREGATION=aggregation, LOSSES=losses, NUMBER=number, WIDTH=width, ROWS=ROWS_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out, scales
