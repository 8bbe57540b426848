"""Launches of the output head's kernels, shared by the operations on hidden states.

Memory: the statistics of column parts, at most 16 bytes a row and part; one tile of logit
gradients (TILE_ELEMENTS, but never fewer than one block of columns a row), as many float32 logits
where they are kept; and float32 sums of grad_hidden where several tiles or parts add to it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from apt_kernels.triton.common import rows
from apt_kernels.triton.head.logits import grad_logits_tile_kernel, head_statistics_kernel
from apt_kernels.triton.head.products import (
    grad_bias_kernel,
    grad_hidden_kernel,
    grad_weight_kernel,
    live_rows_kernel,
)

TILE_ELEMENTS = 2**25
LEAST_COLUMNS = 1024  # a narrower tile would read and write grad_hidden's sums too often
LEAST_ROWS = 256  # fewer rows would read the weight too often where the logits are kept
LEAST_PARTS = 8  # of the columns in a forward pass, however many rows there are
PROGRAMS = 1024  # enough for several waves on every GPU: products are cut up to this many
ROW_GROUP = 16  # row tiles that share one pass over the weight in the second-level cache
NO_EXTRA, ENTROPY, SUM = 0, 1, 2  # what the statistics hold beside the softmax


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Blocks of a product kernel; `stages` of them fit in the 99 KiB of the smallest GPUs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def blocks(self) -> dict:
        return {"BLOCK_M": self.rows, "BLOCK_V": self.columns, "BLOCK_D": self.depth}

    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


HALF_TILES = Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
# Where more than a plain softmax follows the product, wide tiles do not fit in the registers.
NARROW_HALF_TILES = Tiles(rows=128, columns=64, depth=32, warps=8, stages=4)
FLOAT_TILES = Tiles(rows=64, columns=64, depth=16, warps=8, stages=3)
# Rows of an odd width come in single elements, through registers: half the tile, or it spills.
ODD_HALF_TILES = Tiles(rows=64, columns=32, depth=32, warps=8, stages=2)
ODD_FLOAT_TILES = Tiles(rows=32, columns=32, depth=16, warps=4, stages=1)


@dataclasses.dataclass(frozen=True)
class Head:
    """The inputs that all kernels of a head share; `live` lists the rows that count, or is None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float
    live: Tensor | None
    count: Tensor | None

    @property
    def tiles(self) -> Tiles:
        half = self.hidden.element_size() == 2
        if self.odd:
            return ODD_HALF_TILES if half else ODD_FLOAT_TILES
        return HALF_TILES if half else FLOAT_TILES

    @property
    def odd(self) -> bool:
        """Widths that Triton does not know to divide by 16, so that it loads single elements."""
        return self.hidden.shape[-1] % 16 != 0

    def logit_tiles(self, plain: bool) -> Tiles:
        """The tiles of logits, of as many rows as the others.

        plain: a product and a softmax. Logits that are loaded fill the registers of wide tiles.
        """
        crowded = self.softcap or not plain or (self.bias is not None and self.live is not None)
        if self.hidden.element_size() == 2 and not self.odd and crowded:
            return NARROW_HALF_TILES
        return self.tiles

    def options(self) -> dict:
        return {
            "SCALED": self.temperature_tensor is not None or self.temperature != 1.0,
            "CAPPED": self.softcap > 0,
            "PRECISION": _precision(self.hidden),
            "GROUP": ROW_GROUP,
        }


def _precision(tensor: Tensor) -> str:
    return rows.float32_products() if tensor.dtype == torch.float32 else "ieee"


def live_rows(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The places where the mask is true, in order, and their number, without asking the device."""
    if mask is None:
        return None, None
    live = torch.empty_like(mask, dtype=torch.int32)
    count = torch.empty((), dtype=torch.int32, device=mask.device)
    with rows.device_of(mask):
        live_rows_kernel[(1,)](mask, live, count, mask.numel(), BLOCK=4096, num_warps=8)
    return live, count


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The results of `head_statistics` for each part of the columns, one place a row."""

    partials: Tensor  # (4, splits, rows): maximum, sum, extra sum, largest logit
    best: Tensor | None  # (splits, rows): the column of the largest logit
    token_z: Tensor  # (rows,): the scaled logit of the row's token
    splits: int


def head_statistics(
    head: Head, begin: int, end: int, extra: int, with_best: bool, logits: Tensor | None
) -> Statistics:
    """The softmax statistics of the rows at places [begin, end); fills `logits` if given."""
    V, D = head.weight.shape
    plain = extra == NO_EXTRA and logits is None and not with_best
    tiles, count = head.logit_tiles(plain), end - begin
    row_tiles, column_tiles = triton.cdiv(count, tiles.rows), triton.cdiv(V, tiles.columns)
    splits = min(column_tiles, max(LEAST_PARTS, PROGRAMS // row_tiles))
    split_tiles = triton.cdiv(column_tiles, splits)
    splits = triton.cdiv(column_tiles, split_tiles)
    new = head.hidden.new_empty
    partials = new((4, splits, count), dtype=torch.float32)
    best = new((splits, count), dtype=torch.int32) if with_best else None
    token_z = new((count,), dtype=torch.float32)
    with rows.device_of(head.hidden):
        head_statistics_kernel[(row_tiles * splits,)](
            head.hidden, head.weight, head.bias, head.token_ids, head.temperature_tensor, head.live,
            head.count, partials, best, token_z, logits, V, D, begin, end, splits,
            split_tiles, 0 if logits is None else logits.stride(0), head.temperature,
            head.softcap, head.logit_scale, EXTRA=extra, **tiles.blocks(), **head.options(),
            **tiles.launch(),
        )  # fmt: skip
    return Statistics(partials, best, token_z, splits)


@dataclasses.dataclass
class Gradients:
    """Where `head_gradients` puts its sums; None for an input that needs none."""

    hidden: Tensor | None  # (parts, N, D), float32 or, if written once, the dtype of hidden
    weight: Tensor | None
    bias: Tensor | None  # float32

    @classmethod
    def of(cls, head: Head, hidden: bool, weight: bool, bias: bool, tiles_added: int):
        N, D = head.hidden.shape
        tiles = head.tiles
        programs = triton.cdiv(N, tiles.rows) * triton.cdiv(D, tiles.columns)
        parts = max(1, min(8, PROGRAMS // 4 // programs))
        once = tiles_added == 1 and parts == 1
        sums = None
        if hidden:
            dtype = head.hidden.dtype if once else torch.float32
            new = head.hidden.new_empty if head.live is None else head.hidden.new_zeros
            sums = new((parts, N, D), dtype=dtype)
        return cls(
            sums,
            torch.empty_like(head.weight) if weight else None,
            head.weight.new_empty(head.weight.shape[0], dtype=torch.float32) if bias else None,
        )

    def results(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_hidden, grad_weight, grad_bias), (0,) for those that were not asked for."""
        hidden, weight, bias = (head.hidden.new_empty(0) for _ in range(3))
        if self.hidden is not None:
            sums = self.hidden[0] if len(self.hidden) == 1 else self.hidden.sum(0)
            hidden = sums.to(head.hidden.dtype)
        if self.weight is not None:
            weight = self.weight
        if self.bias is not None:
            bias = self.bias.to(head.bias.dtype)
        return hidden, weight, bias


def tile_columns(head: Head) -> int:
    """The width of a tile of logit gradients of all rows: a whole number of column blocks."""
    (N, _), V = head.hidden.shape, head.weight.shape[0]
    block = head.tiles.columns
    width = min(TILE_ELEMENTS // N, max(LEAST_COLUMNS, V // 16), V)
    return max(triton.cdiv(width, block), 1) * block


def rows_with_logits(head: Head) -> int:
    """How many rows' logits are kept at a time where the gradient is formed from them."""
    (N, _), V = head.hidden.shape, head.weight.shape[0]
    count = max(LEAST_ROWS, min(TILE_ELEMENTS // V, N // 4))
    return min(N, count // head.tiles.rows * head.tiles.rows)


def padded_columns(head: Head) -> int:
    return triton.cdiv(head.weight.shape[0], head.tiles.columns) * head.tiles.columns


@dataclasses.dataclass(frozen=True)
class Factors:
    """The divisors of the upstream gradients: powers of two in float32, one a row.

    Upstream gradients are divided by them, so that float16 can hold the gradients of the logits.
    The products are multiplied by them again. In a sum over rows, a row's factor is `relative`
    to one factor that all rows share.
    """

    of_rows: Tensor | None  # (N,), or expanded: of grad_hidden
    relative: Tensor | None  # (N,), at most 1
    common: Tensor | None  # (): of grad_weight and grad_bias

    @classmethod
    def one(cls, factor: Tensor, N: int) -> Factors:
        """The same for all rows."""
        return cls(factor.expand(N), None, factor)

    @classmethod
    def of(cls, size: Tensor) -> Factors:
        """Of rows whose largest upstream gradient is `size`. One that is not finite counts as 1."""
        power = (size.view(torch.int32) & 0x7F800000).view(torch.float32)
        usable = (power > 0) & (power < torch.inf)
        common = torch.where(usable, power, 0.0).amax()
        common = torch.where(common > 0, common, 1.0)
        of_rows = torch.where(usable, power, 1.0)
        return cls(of_rows, torch.where(usable, power / common, 1.0), common)


def head_gradients(
    head: Head, begin: int, end: int, width: int, logits: Tensor | None, lse: Tensor,
    entropy: Tensor | None, grad: Tensor, grad_entropy: Tensor | None, smoothing: float,
    factors: Factors | None, gradients: Gradients,
) -> None:  # fmt: skip
    """Adds the gradients of the rows at places [begin, end) for the upstream factors * grad.

    grad is one number a row or, expanded, one for all. The weight's gradient must come from one
    call over all rows; `logits`, where kept, span all columns, and so must `width` then.
    """
    factors = factors or Factors(None, None, None)
    of_rows, relative, common = factors.of_rows, factors.relative, factors.common
    V, D = head.weight.shape
    tiles, count = head.tiles, end - begin
    relative_sums = relative if gradients.bias is not None else None
    plain = logits is None and grad_entropy is None and relative_sums is None
    logit_tiles = head.logit_tiles(plain)
    row_tiles, column_tiles = triton.cdiv(count, tiles.rows), width // tiles.columns
    depth_tiles = triton.cdiv(D, tiles.columns)
    tile = head.hidden.new_empty((count, width))
    sums = None
    if gradients.bias is not None:
        sums = head.hidden.new_empty((row_tiles, width), dtype=torch.float32)
    products = {
        "BLOCK_D": tiles.columns, "BLOCK_K": tiles.depth, "GROUP": ROW_GROUP,
        "PRECISION": _precision(head.hidden), **tiles.launch(),
    }  # fmt: skip
    weight_products = products
    if relative is not None and torch.version.hip:  # its stages would be beyond the 64 KiB there
        weight_products = {**products, "num_stages": 2}
    with rows.device_of(head.hidden):
        for column in range(0, V, width):
            grad_logits_tile_kernel[(row_tiles * (width // logit_tiles.columns),)](
                head.hidden, head.weight, head.bias, head.token_ids, head.temperature_tensor,
                head.live, head.count, logits, lse, entropy, grad, grad_entropy, relative_sums,
                tile, sums, V, D, begin, end, column, width, grad.stride(0), head.temperature,
                head.softcap, head.logit_scale, smoothing, **logit_tiles.blocks(), **head.options(),
                **logit_tiles.launch(),
            )  # fmt: skip
            if gradients.hidden is not None:
                parts, N, _ = gradients.hidden.shape
                split_blocks = triton.cdiv(width // tiles.depth, parts)
                grad_hidden_kernel[(row_tiles * depth_tiles, parts)](
                    tile, head.weight, head.live, head.count, of_rows, gradients.hidden,
                    N, V, D, begin, end, column, width, split_blocks,
                    0 if of_rows is None else of_rows.stride(0),
                    BLOCK_M=tiles.rows, ADD=column > 0, **products,
                )  # fmt: skip
            if gradients.weight is not None:
                grad_weight_kernel[(column_tiles * depth_tiles,)](
                    tile, head.hidden, head.live, head.count, relative, common, gradients.weight,
                    count, V, D, column, width, BLOCK_V=tiles.columns, **weight_products,
                )  # fmt: skip
            if gradients.bias is not None:
                grad_bias_kernel[(triton.cdiv(width, 128),)](
                    sums, head.count, common, gradients.bias, V, begin, end, column, width,
                    BLOCK_M=tiles.rows, BLOCK=128, ADD=begin > 0, num_warps=4,
                )  # fmt: skip
