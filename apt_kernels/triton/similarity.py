"""What the contrastive kernels share: tiles of dot products of unit rows, launches, row norms.

Rows are multiplied as they came and the products scaled: bfloat16 and float16 products are exact in
float32. Everything is in units of the dot product d = u . v, of which the score is d / temperature.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels.triton import rows

NOWHERE = -(2**30)  # an offset that leads from no row to a column
LENGTHS = ["N", "M", "label_offset", "self_offset", "first", "count", "per_split"]
SMALLEST_SQUARED_NORM = tl.constexpr(1e-24)
INFINITY = tl.constexpr(float("inf"))


@dataclasses.dataclass(frozen=True)
class Side:
    """The rows (or columns) of the similarities: any strides, and 1/|x| or None for rows as is."""

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
    """Square tiles, so that a triangle of them is one."""
    depth = 64 if x.element_size() == 2 else 32
    depth = min(depth, max(16, triton.next_power_of_2(x.shape[1])))
    part = min(128, max(16, triton.next_power_of_2(x.shape[1])))
    if gradient:
        return Tiles(rows=64, columns=64, depth=depth, part=part, warps=4, stages=2)
    return Tiles(rows=64, columns=64, depth=depth, part=part, warps=4, stages=3)


def precision(x: Tensor) -> str:
    """How float32 is multiplied: as PyTorch is told to, and otherwise to float32's own accuracy."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gradient_precision(x: Tensor) -> str:
    """Coefficients beside float16 rows are float32: in float16 the small ones would vanish. TF32
    holds float16 exactly."""
    if x.dtype == torch.float16:
        return "ieee" if torch.version.hip else "tf32"
    return precision(x)


def side(x: Tensor, normalize: bool) -> Side:
    if not normalize:
        return Side(x, None)
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        with rows.device_of(x):
            _inverse_norms_kernel[(x.shape[0],)](
                x, inverse, x.stride(0), x.stride(1), x.shape[1],
                BLOCK=min(1024, max(16, triton.next_power_of_2(x.shape[1]))),
            )  # fmt: skip
    return Side(x, inverse)


# What: 1/|x| of a row, 0 for |x|^2 <= 1e-24. Passes: one. Bytes: D elements read, 4 written.
# Parallelism: one program a row. Accuracy: float32.
@triton.jit
def _inverse_norms_kernel(x_ptr, inverse_ptr, stride, step, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = x_ptr + row * stride + column.to(tl.int64) * step
        x = tl.load(at, mask=column < D, other=0.0).to(tl.float32)
        squares += x * x
    squared = tl.sum(squares, 0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(squared, SMALLEST_SQUARED_NORM)))
    tl.store(inverse_ptr + row, tl.where(squared > SMALLEST_SQUARED_NORM, inverse, 0.0))


@triton.jit
def scale_of(temperature_ptr, temperature):
    """1 / temperature, not a number for a wrong one."""
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    right = (temperature > 0) & (temperature < INFINITY)
    return tl.where(right, tl.div_rn(1.0, tl.where(right, temperature, 1.0)), float("nan"))


@triton.jit
def factors(inverse_ptr, index, live):
    """What brings rows to unit length; 0 for those beyond the end and those without a direction."""
    if inverse_ptr is None:
        return tl.where(live, 1.0, 0.0)
    else:
        return tl.load(inverse_ptr + index, mask=live, other=0.0)


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
