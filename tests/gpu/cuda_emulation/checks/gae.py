"""Checks of gae: against the reference in float32 and float64, over the registry's samples."""

from __future__ import annotations

from unittest import mock

import torch

from apt_kernels import dispatch, gae, reference
from apt_kernels.registry import OPS, Sample
from apt_kernels.testing import assert_as_accurate

from .registry import FLOATS, check, randn

EVERY = 3  # sample of the registry here; all of them run in test_all_backends.py


def _compare(kernels, sample: Sample) -> None:
    with mock.patch.dict(dispatch._KERNELS, {("gae_fwd", "native"): kernels.gae_fwd}):
        results = gae(*sample.args, **sample.kwargs, backend="native")
    plain = reference.gae(*sample.args, **sample.kwargs)

    def double(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    exact = reference.gae(
        *map(double, sample.args), **{name: double(x) for name, x in sample.kwargs.items()}
    )
    names = (f"advantages of {sample.name}", f"returns of {sample.name}")
    for triple in zip(results, plain, exact, names, strict=True):
        assert_as_accurate(*triple[:3], name=triple[3])


for _name, _dtype in FLOATS.items():

    @check(f"gae_samples-{_name}")
    def _(kernels, dtype=_dtype):
        for sample in list(OPS["gae"].samples(dtype))[::EVERY]:
            _compare(kernels, sample)


def _long(rows: int, length: int, **options) -> Sample:
    """Rows of several tiles with gaps longer than a warp, and episodes that end in all of them."""
    steps = torch.arange(length)
    flags = {
        "mask": ((steps % 97 < 40) & (steps % 7 != 3)).repeat(rows, 1)
        | (torch.arange(rows)[:, None] == 1),
        "terminated": (steps % 41 == 7).repeat(rows, 1),
        "truncated": (steps % 53 == 11).repeat(rows, 1),
        "bootstrap": randn(rows, seed=3),
    }
    args = (randn(rows, length, seed=1), randn(rows, length, seed=2))
    return Sample(f"long_{sorted(options)}", args, flags | options)


@check(small=True)
def gae_several_tiles(kernels):
    _compare(kernels, _long(3, 1400, whiten=True))  # and several blocks that whiten
    for whiten in (False, True):
        _compare(kernels, _long(2, 600, whiten=whiten))
    plain = _long(2, 600)
    _compare(kernels, Sample("long_plain", plain.args, {"gamma": 1.0, "gae_lambda": 1.0}))


@check(small=True)
def gae_side_by_side(kernels):
    args = (randn(9, 150, seed=1), randn(9, 150, seed=2))
    _compare(kernels, Sample("side_by_side", args, {"time_major": True, "whiten": True}))


@check(small=True)
def gae_packed(kernels):
    offsets = torch.tensor([0, 0, 300, 301, 340, 340, 700])
    args = (randn(700, seed=1), randn(700, seed=2))
    options = {"cu_seqlens": offsets, "bootstrap": randn(6, seed=3)}
    _compare(kernels, Sample("packed", args, options))


@check()
def gae_what_follows_a_cut_does_not_matter(kernels):
    """An infinite reward of a later episode stays there, whichever scan it lies in."""
    for length in (8, 200, 600):
        rewards, values = randn(1, length, seed=1), randn(1, length, seed=2)
        ends = torch.arange(length)[None] == length // 2 - 1
        wanted = kernels.gae_fwd(
            rewards, values, None, ends, None, None, None, 0.99, 0.95, False, False
        )
        rewards = torch.where(torch.arange(length)[None] == length - 1, torch.inf, rewards)
        got = kernels.gae_fwd(
            rewards, values, None, ends, None, None, None, 0.99, 0.95, False, False
        )
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g[:, : length // 2], w[:, : length // 2])
            assert g[:, length // 2 :].isinf().all()
