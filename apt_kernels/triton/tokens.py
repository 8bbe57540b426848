"""What the losses of tokens share: counting, the factor of a row, sums in a fixed order.

A loss takes three launches: `count_rows` (the tokens of each row, and its mean log-ratio; one more
for the totals of many rows), the loss of a tile of a row in each program, with partial sums, and
`sum_partials`.
"""

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows

BLOCK = 1024  # tokens a program takes
WARPS = 8  # 4 tokens a thread: 16 bytes of float32, so that a warp asks for whole sectors
ROWS_BLOCK = 512  # row lengths that are added at a time; not BLOCK: tokens would lie as they do
FEW_ROWS = 16  # lengths that every program adds for itself; of more, a launch makes the totals

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
    """What a program sees of its row: (start, head, end, live, vectors, rest).

    Its tokens, the live ones, are those from head to end, counted from start, the place in the row
    (UNIT 0: in the tensor, a multiple of 16). UNIT 0: they are loaded with their neighbours in
    whole `vectors`; `rest`: some lie behind the last of those in the tensor.
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
    return start, head, end, live, vectors, rest


@triton.jit
def read(
    ptr, row, stride, start, live, vectors, rest, counts, STEP: tl.constexpr, UNIT: tl.constexpr
):
    """One number a token of a window, or one a row (STEP 0); 0 where nothing counts.

    Loaded wherever there is a token, for a mask from memory would part the vectors.
    """
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
def write(ptr, row, T, start, head, end, live, x, UNIT: tl.constexpr):
    """x to the tokens of a window, in a tensor [B, T] without gaps."""
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
        grad = d * 0.0 + 1.0
    elif ESTIMATOR == 2:
        value = 0.5 * d * d
        grad = d
    else:
        x = bounded(-d)
        value, expm1 = exp_minus(x, tl.exp(x))
        grad = tl.where(x == -d, -expm1, 0.0)
    return value, grad


@triton.jit
def _totals(lengths_ptr, B, ROWS: tl.constexpr):
    """The number of tokens, and of rows with any."""
    tokens = tl.zeros((ROWS,), tl.int64)
    full = tl.zeros((ROWS,), tl.int64)
    for start in range(0, B, ROWS):
        i = start + tl.arange(0, ROWS)
        length = tl.load(lengths_ptr + i, mask=i < B, other=0)
        tokens += length
        full += (length > 0).to(tl.int64)
    return tl.sum(tokens, 0), tl.sum(full, 0)


@triton.jit
def row_scale(
    lengths_ptr, totals_ptr, normalizer_ptr, row, B, T, AGGREGATION: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The factor of the losses of a row, and the number of tokens (at least 1) of all rows."""
    if totals_ptr is None:
        tokens, full = _totals(lengths_ptr, B, ROWS)
    else:  # a vector, which one warp loads; a number would be loaded by all
        k = tl.arange(0, ROWS)
        both = tl.load(totals_ptr + k, mask=k < 2, other=0)
        tokens = tl.sum(tl.where(k == 0, both, 0), 0)
        full = tl.sum(tl.where(k == 1, both, 0), 0)
    count = tl.maximum(tokens, 1).to(tl.float32)
    filled = tl.maximum(full, 1).to(tl.float32)
    if normalizer_ptr is not None:
        scale = 1.0 / tl.load(normalizer_ptr)
    elif AGGREGATION == TOKEN_MEAN:
        scale = 1.0 / count
    elif AGGREGATION == TOKEN_SUM:
        scale = count * 0.0 + 1.0
    elif AGGREGATION == DR_GRPO:
        scale = 1.0 / (filled * T.to(tl.float32))
    else:
        scale = 1.0 / filled
    if AGGREGATION == SEQUENCE_MEAN:
        scale = scale / tl.maximum(tl.load(lengths_ptr + row), 1).to(tl.float32)
    return scale, count


# What: the tokens that count in each row and, for losses of sequences, the mean of x - y there.
# Passes: one. Bytes: the mask (and two numbers a token) read. Parallelism: a row a program.
# Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["T", "mask_b", "x_b", "y_b"])
def _count_rows_kernel(
    mask_ptr, x_ptr, y_ptr, lengths_ptr, means_ptr, T: tl.int64, mask_b: tl.int64, x_b: tl.int64,
    y_b: tl.int64, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT if UNIT else 1
    count = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tl.cdiv(T if UNIT else T + 15, BLOCK)):
        start, _, _, live, vectors, rest = window(row, tile, tl.num_programs(0), T, UNIT, BLOCK)
        counts = read(mask_ptr, row, mask_b, start, live, vectors, rest, live, 1, UNIT) != 0
        count += counts.to(tl.int64)
        if y_ptr is not None:
            x = read(x_ptr, row, x_b, start, live, vectors, rest, counts, 1, UNIT)
            total += x - read(y_ptr, row, y_b, start, live, vectors, rest, counts, 1, UNIT)
    length = tl.sum(count, 0)
    tl.store(lengths_ptr + row, length)
    tl.store(means_ptr + row, tl.sum(total, 0) / tl.maximum(length, 1).to(tl.float32))


# What: the tokens of all rows, and the rows with any. Passes: one. Bytes: 8 a row. One program.
@triton.jit(do_not_specialize=["B"])
def _totals_kernel(lengths_ptr, totals_ptr, B: tl.int64, ROWS: tl.constexpr):
    tokens, full = _totals(lengths_ptr, B, ROWS)
    tl.store(totals_ptr, tokens)
    tl.store(totals_ptr + 1, full)


# What: out[k] = sum of partials[k], divided by the number of tokens where DIVIDED has bit k.
# Passes: one. Bytes: the partial sums read. Parallelism: a quantity a program.
# Accuracy: float64, fixed order.
@triton.jit(do_not_specialize=["B", "P"])
def _sum_partials_kernel(
    partials_ptr, lengths_ptr, totals_ptr, out_ptr, B: tl.int64, P: tl.int64,
    DIVIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, P, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + k * P + i, mask=i < P, other=0.0).to(tl.float64)
    _, count = row_scale(lengths_ptr, totals_ptr, None, 0, B, B, 0, BLOCK)
    result = tl.sum(total, 0)
    tl.store(out_ptr + k, tl.where(((DIVIDED >> k) & 1) != 0, result / count, result))


def count_rows(mask, x=None, y=None):
    """(lengths (B,) int64, their totals (2,) or None, means of x - y (B,) float32, 0 without)."""
    B, T = mask.shape
    lengths = mask.new_empty(B, dtype=torch.int64)
    means = mask.new_empty(B, dtype=torch.float32)
    totals = None if B <= FEW_ROWS else mask.new_empty(2, dtype=torch.int64)
    unit, strides = row_layout(T, mask, x, y)
    with rows.device_of(mask):
        _count_rows_kernel[(B,)](
            mask, x, y, lengths, means, T // max(unit, 1), *strides,
            UNIT=unit, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if totals is not None:
            _totals_kernel[(1,)](lengths, totals, B, ROWS=ROWS_BLOCK, num_warps=WARPS)
    return lengths, totals, means


def sum_partials(partials, lengths, totals, divided):
    """The sums of the rows of `partials`; row k divided by the tokens where bit k is set."""
    K, P = partials.shape
    out = partials.new_empty(K, dtype=torch.float32)
    with rows.device_of(partials):
        _sum_partials_kernel[(K,)](
            partials, lengths, totals, out, lengths.shape[0], P,
            DIVIDED=divided, BLOCK=ROWS_BLOCK, num_warps=4,
        )  # fmt: skip
    return out
