"""What the contrastive kernels share: tiles of dot products of unit rows, launches, row norms.

Rows are multiplied as they came and the products scaled: bfloat16 and float16 products are exact in
float32. Everything is in units of the dot product d = u . v, of which the score is d / temperature.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels.triton.common import rows

ROWS = 16  # of a program that takes rows one by one
NOWHERE = -(2**30)  # an offset that leads from no row to a column
LENGTHS = ["N", "M", "label_offset", "self_offset", "first", "count", "per_split"]
SMALLEST_SQUARED_NORM = tl.constexpr(1e-24)
INFINITY = tl.constexpr(float("inf"))


@dataclasses.dataclass(frozen=True)
class Side:
    """The rows (or columns) of the similarities: any strides, and 1/|x| or None for rows as is.

    inverse is (2, N): the float and what it lacks of the real number.
    """

    x: Tensor
    inverse: Tensor | None

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def arguments(self) -> tuple:
        return self.x, self.inverse, self.x.stride(0), self.x.stride(1)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Blocks of a kernel: rows, columns, depth of a product's step, width of a gradient's part."""

    rows: int
    columns: int
    depth: int
    part: int
    warps: int
    stages: int

    def blocks(self) -> dict:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_D": self.depth}

    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiles(x: Tensor, gradient: bool = False) -> Tiles:
    """The largest that fit in the registers. Square forward, so that a triangle of them is one."""
    width = max(16, triton.next_power_of_2(x.shape[1]))
    half = x.element_size() == 2
    depth, part = min(64 if half else 16, width), min(128, width)
    if gradient and torch.version.hip:
        depth, part = min(32, depth), min(64, part)
        return Tiles(rows=64, columns=16, depth=depth, part=part, warps=8, stages=2)
    if gradient:
        columns = 32 if x.dtype == torch.bfloat16 else 16  # coefficients beside float16: float32
        # of narrow rows ptxas gives a thread too few registers on sm_100: a tile of half the size
        taken, warps = (32, 4) if width == 16 else (64, 8)
        return Tiles(rows=taken, columns=columns, depth=depth, part=part, warps=warps, stages=2)
    return Tiles(rows=64, columns=64, depth=depth, part=part, warps=8, stages=3)


def precision(x: Tensor) -> str:
    return rows.float32_products() if x.dtype == torch.float32 else "ieee"


def gradient_precision(x: Tensor) -> str:
    """Coefficients beside float16 rows are float32: in float16 the small ones would vanish. TF32
    holds float16 exactly."""
    if x.dtype == torch.float16:
        return "ieee" if torch.version.hip else "tf32"
    return precision(x)


def side(x: Tensor, normalize: bool) -> Side:
    if not normalize:
        return Side(x, None)
    inverse = torch.empty((2, x.shape[0]), dtype=torch.float32, device=x.device)
    if x.shape[0]:
        with rows.device_of(x):
            _inverse_norms_kernel[(triton.cdiv(x.shape[0], ROWS),)](
                x, inverse, x.stride(0), x.stride(1), x.shape[0], x.shape[1],
                ROWS=ROWS, BLOCK=width_block(x),
            )  # fmt: skip
    return Side(x, inverse)


def width_block(x: Tensor) -> int:
    """Columns that a program of `ROWS` rows takes at a time."""
    return min(128, max(16, triton.next_power_of_2(x.shape[1])))


# What: 1/|x| of rows as the sum of two floats, 0 for |x|^2 <= 1e-24, NaN where |x|^2 is not finite.
# Passes: one.
# Bytes: D elements a row read, 8 written. Parallelism: blocks of rows. Accuracy: float64, as an
# error would shift a whole row of scores.
@triton.jit(do_not_specialize=["N"])
def _inverse_norms_kernel(
    x_ptr, inverse_ptr, stride, step, N: tl.int32, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    squares = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = x_ptr + row.to(tl.int64)[:, None] * stride + column.to(tl.int64)[None, :] * step
        mask = live[:, None] & (column < D)[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        squares += x * x
    squared = tl.sum(squares, 1)
    inverse = 1.0 / tl.sqrt(tl.maximum(squared, SMALLEST_SQUARED_NORM))
    inverse = tl.where(squared <= SMALLEST_SQUARED_NORM, 0.0, inverse)
    inverse = tl.where(squared < INFINITY, inverse, float("nan"))
    high = inverse.to(tl.float32)
    tl.store(inverse_ptr + row, high, mask=live)
    rest = (inverse - high.to(tl.float64)).to(tl.float32)
    tl.store(inverse_ptr + N.to(tl.int64) + row, rest, mask=live)


@triton.jit
def scale_of(temperature_ptr, scale):
    """1 / temperature, of the tensor if there is one; not a number for a wrong one."""
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr).to(tl.float32)
        right = (t > 0.0) & (t < float("inf"))
        scale = tl.where(right, tl.div_rn(1.0, tl.where(right, t, 1.0)), float("nan"))
    return scale


@triton.jit
def factors(inverse_ptr, count, index, live):
    """What brings rows to unit length, as two floats; 0 for those beyond the end and those without
    a direction."""
    if inverse_ptr is None:
        high = tl.where(live, 1.0, 0.0)
        return high, tl.zeros_like(high)
    else:
        high = tl.load(inverse_ptr + index, mask=live, other=0.0)
        return high, tl.load(inverse_ptr + count + index, mask=live, other=0.0)


@triton.jit
def scaled(raw, a_factor, a_rest, b_factor, b_rest):
    """raw products times the factors of row and column, rounded once."""
    factor = a_factor[:, None] * b_factor[None, :]
    rest = tl.fma(a_factor[:, None], b_factor[None, :], -factor)
    rest += a_factor[:, None] * b_rest[None, :] + a_rest[:, None] * b_factor[None, :]
    return tl.fma(raw, factor, raw * rest)


@triton.jit
def unit_rows(x_ptr, inverse_ptr, stride, step, count, row, live, column, D):
    """Some columns of unit rows in float32, and the factors of the rows."""
    factor, _ = factors(inverse_ptr, count, row, live)
    at = x_ptr + row.to(tl.int64)[:, None] * stride + column.to(tl.int64)[None, :] * step
    x = tl.load(at, mask=(factor != 0)[:, None] & (column < D)[None, :], other=0.0)
    return x.to(tl.float32) * factor[:, None], factor


@triton.jit
def row_products(
    a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, b_ptr, b_inverse_ptr, b_stride, b_step, M,
    other, here, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u . v of one unit row of b for each of a; 0 where either is not there."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a, _ = unit_rows(a_ptr, a_inverse_ptr, a_stride, a_step, N, row, live, column, D)
        b, _ = unit_rows(b_ptr, b_inverse_ptr, b_stride, b_step, M, other, here, column, D)
        total += a * b
    return tl.sum(total, 1)


@triton.jit
def products(
    a_ptr, a_stride, a_step, a_index, a_factor, b_ptr, b_stride, b_step, b_index, b_factor, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a . b of all pairs, as the rows came; rows of factor 0 are not read."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_row = a_ptr + a_index.to(tl.int64) * a_stride
    b_row = b_ptr + b_index.to(tl.int64) * b_stride
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < D
        column = column.to(tl.int64)
        a_mask = (a_factor != 0)[:, None] & inside[None, :]
        b_mask = (b_factor != 0)[None, :] & inside[:, None]
        a = tl.load(a_row[:, None] + column[None, :] * a_step, mask=a_mask, other=0.0)
        b = tl.load(b_row[None, :] + column[:, None] * b_step, mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def at_offset(row, column, offset, BOTH_WAYS: tl.constexpr):
    """Whether column = row + offset; BOTH_WAYS: or row = column + offset."""
    found = column[None, :] == row[:, None] + offset
    if BOTH_WAYS:
        found = found | (row[:, None] == column[None, :] + offset)
    return found


@triton.jit
def rounded_to_tf32(x):
    """The nearest float of 10 bits: the tensor cores would cut the others off."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
