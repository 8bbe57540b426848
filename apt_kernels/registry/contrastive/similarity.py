"""Inputs of the contrastive losses' samples; no operation of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..entry import Rejected, Sample, seeded


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A leaf of random rows."""
    generator = seeded(seed)
    return (torch.randn(count, width, generator=generator) * scale).to(dtype).requires_grad_()


def near(
    x: Tensor, noise: float = 2.0, seed: int = 1, count: int | None = None, first: int = 0
) -> Tensor:
    """Rows of which those from `first` on lie near the rows of x; a leaf."""
    generator = seeded(seed)
    y = torch.randn(x.shape[0] if count is None else count, x.shape[1], generator=generator) * noise
    y[first : first + len(x)] += x.detach().float()[: len(y) - first]
    return y.to(x.dtype).requires_grad_()


def temperature(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def pairs(dtype: torch.dtype) -> Iterator[Sample]:
    """Queries and keys, or both views, that every loss of pairs must take.

    Errors are judged against the reference's own. At a temperature of 0.01 an error of the dot
    products, 1e-7, is 1e-5 of the loss on either side, and which of two such numbers is larger is
    chance: there, every row is compared with the worst of many (reduction "none").
    """
    x = rows(6, 12, dtype)
    y = near(x)
    yield Sample("plain", (x, y))
    yield Sample("temperature", (x, y), {"temperature": temperature(0.2)})
    yield Sample("none", (x, y), {"temperature": temperature(0.5), "reduction": "none"})
    yield Sample("sum", (x, y), {"temperature": 0.5, "reduction": "sum"})
    a = rows(33, 65, dtype, seed=2)
    sharp = {"temperature": 0.01, "reduction": "none"}
    yield Sample("scale_100", (a, near(a, noise=4.0)), sharp)
    yield Sample("scale_100_unrelated", (a, rows(33, 65, dtype, seed=3)), sharp)
    # no key is similar: every similarity is near -100
    north = near(torch.ones(39, 20, dtype=dtype), noise=0.05)
    south = near(-torch.ones(39, 20, dtype=dtype), noise=0.05, seed=4)
    yield Sample("no_similar_column", (north, south), sharp)
    for scale in (31, 33):  # on both sides of a bound of the CPU kernels
        options = {"temperature": 1 / scale, "reduction": "none"}
        yield Sample(f"no_similar_column_scale_{scale}", (north, south), options)
        yield Sample(f"unrelated_scale_{scale}", (a, rows(33, 65, dtype, seed=3)), options)
    yield Sample("nearly_equal", (north, near(north, noise=0.05, seed=5)), sharp)
    yield Sample("unnormalised", (x, y), {"normalize": False, "temperature": temperature(4.0)})
    large, large_too = rows(33, 16, dtype, scale=3.0), rows(33, 16, dtype, seed=6, scale=3.0)
    options = {"normalize": False, "temperature": 0.5, "reduction": "none"}
    yield Sample("unnormalised_large", (large, large_too), options)
    for count, width in ((1, 7), (2, 2), (5, 3), (16, 16), (17, 33), (67, 31)):
        z = rows(count, width, dtype, seed=30 + count)
        yield Sample(f"{count}_by_{width}", (z, near(z)), {"temperature": temperature(0.3)})
    one, one_too = rows(9, 1, dtype), rows(9, 1, dtype, seed=4)
    yield Sample("one_column", (one, one_too), {"normalize": False, "temperature": 1.0})
    zero = x.detach().clone()
    zero[2] = 0
    zero[4] *= 1e-13 if dtype != torch.float16 else 0
    zero_too = y.detach().clone()
    zero_too[2:4] = 0
    zero_rows = (zero.requires_grad_(), zero_too.requires_grad_())
    yield Sample("zero_rows", zero_rows, {"temperature": 0.2})
    nothing = torch.zeros(3, 5, dtype=dtype).requires_grad_()
    yield Sample("all_zero", (nothing, nothing.detach().clone().requires_grad_()))
    small = (x.detach() * 1e-3).requires_grad_()
    long = (y.detach() * 100).requires_grad_()
    yield Sample("short_and_long_rows", (small, long), {"temperature": 0.3})
    equal = torch.ones(5, 8, dtype=dtype)
    yield Sample("equal_embeddings", (equal, equal.clone()), {"temperature": 0.3})
    wide = rows(8, 40, dtype, seed=7)
    mild = {"temperature": 0.3}
    yield Sample("sliced", (wide[1:, 3:20], wide[:7, 22:39]), mild)
    yield Sample("every_other_column", (wide[::2, ::2], wide[1::2, 1::2]), mild)
    yield Sample("transposed", (wide.t(), wide.t().flip(0)), mild)
    yield Sample("expanded", (wide[4:5].expand(4, 40), wide[:4]), mild)
    yield Sample("frozen_first", (x.detach(), y))
    yield Sample("frozen_second", (x, y.detach()), {"temperature": temperature(0.2)})
    yield Sample("frozen", (x.detach(), y.detach()))
    yield Sample("temperature_alone", (x.detach(), y.detach()), {"temperature": temperature(0.2)})
    none = rows(0, 6, dtype)
    yield Sample("no_rows", (none, rows(0, 6, dtype)), {"temperature": temperature(0.2)})
    yield Sample("no_rows_none", (none, rows(0, 6, dtype)), {"reduction": "none"})
    # several tiles, and bfloat16 products where the processor has them
    many = rows(530, 25, dtype, seed=8)
    several = {"temperature": 0.5, "reduction": "none"}
    yield Sample("several_tiles", (many, near(many)), several)
    yield Sample("several_tiles_mean", (many, near(many)), {"temperature": temperature(0.5)})
    yield Sample("several_tiles_sharp", (many, near(many)), {"temperature": 0.02})


def rejected(first: str, second: str) -> Iterator[Rejected]:
    """What every loss of pairs refuses; the names of its arguments."""
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    yield Rejected("not_a_tensor", ([1.0], y), {}, TypeError, f"{first}: expected a tensor")
    yield Rejected("second_type", (x, None), {}, TypeError, f"{second}: expected a tensor")
    yield Rejected("integers", (x.long(), y), {}, TypeError, f"{first}: expected dtype float32")
    yield Rejected("one_dimension", (x[0], y), {}, ValueError, rf"{first}: .*\(N, D\).*\(8,\)")
    yield Rejected("no_width", (x[:, :0], y[:, :0]), {}, ValueError, f"{first}: .*D >= 1")
    yield Rejected("widths", (x, y[:, :7]), {}, ValueError, rf"{second}: .*\(N, 8\).*\(4, 7\)")
    yield Rejected("dtypes", (x, y.half()), {}, TypeError, f"{second}: expected the dtype of")
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        options = {"temperature": bad}
        yield Rejected(f"temperature_{bad}", (x, y), options, ValueError, "temperature: .*above 0")
    options = {"temperature": "0.1"}
    yield Rejected("temperature_type", (x, y), options, TypeError, "temperature: expected a number")
    options = {"temperature": torch.ones(4)}
    yield Rejected("temperature_shape", (x, y), options, ValueError, r"temperature: .*\(\).*\(4,\)")
    options = {"temperature": torch.tensor(1)}
    yield Rejected("temperature_dtype", (x, y), options, TypeError, "temperature: expected dtype")
    options = {"reduction": "batchmean"}
    yield Rejected("reduction", (x, y), options, ValueError, "reduction: .*'batchmean'")
    options = {"process_group": 2}
    yield Rejected("process_group", (x, y), options, TypeError, "process_group: expected")
    options = {"return_correct": 1}
    yield Rejected("return_correct", (x, y), options, TypeError, "return_correct: expected True")
    yield Rejected("backend", (x, y), {"backend": "fastest"}, ValueError, "backend: .*'fastest'")


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
