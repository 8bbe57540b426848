"""A sample keeps its layout wherever it goes."""

from __future__ import annotations

import pytest
import torch

from apt_kernels.calls import fresh, tensors
from apt_kernels.registry import OPS, Sample

# Shapes and strides can be had of "meta" without a GPU, and it too is another device than the CPU.
DEVICES = ("cpu", "meta", *(("cuda",) if torch.cuda.is_available() else ()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_a_fresh_sample_has_the_layout_of_the_given_one(op, device):
    for sample in op.samples(op.dtypes[0]):
        for moved, given in zip(tensors(fresh(sample, device)), tensors(sample), strict=True):
            assert moved.device.type == device and moved.dtype == given.dtype
            assert moved.shape == given.shape and moved.stride() == given.stride(), sample.name
            assert moved.storage_offset() == given.storage_offset(), sample.name
            assert moved.requires_grad == given.requires_grad


def test_a_fresh_sample_has_the_values_and_a_memory_of_its_own():
    gaps = torch.arange(24.0).view(4, 6)[1:, ::2]
    (moved,) = fresh(Sample("", (gaps,))).args
    assert torch.equal(moved, gaps)
    moved.zero_()
    assert gaps.all()
