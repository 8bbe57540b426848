"""Checks of mlm_mask: the same bits as the reference, over the registry's samples."""

from __future__ import annotations

from unittest import mock

import torch

from apt_kernels import dispatch, mlm_mask, reference
from apt_kernels.registry import OPS, Sample

from .registry import check


def _compare(kernels, sample) -> None:
    with mock.patch.dict(dispatch._KERNELS, {("mlm_mask_fwd", "native"): kernels.mlm_mask_fwd}):
        results = mlm_mask(*sample.args, **sample.kwargs, backend="native")
    wanted = reference.mlm_mask(*sample.args, **sample.kwargs)
    for got, expected in zip(results, wanted, strict=True):
        assert torch.equal(got, expected), sample.name


@check()
def mlm_mask_samples(kernels):
    for dtype in OPS["mlm_mask"].dtypes:
        for sample in OPS["mlm_mask"].samples(dtype):
            _compare(kernels, sample)


@check(small=True)
def mlm_mask_several_tiles(kernels):
    """One row of three tiles, words across their borders, nothing chosen at first."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (1, 520), generator=generator)
    words = torch.arange(520)[None] // 7
    options = {"mask_token_id": 4, "vocab_size": 50, "word_ids": words, "at_least_one": True}
    for seed in range(6):
        for mask_prob in (0.3, 0.0):
            kwargs = {"seed": seed, "mask_prob": mask_prob, **options}
            _compare(kernels, Sample(f"seed_{seed}_{mask_prob}", (ids,), kwargs))
