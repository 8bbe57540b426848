"""What the registry cannot say of value_loss."""

from __future__ import annotations

import pytest
import torch

import apt_kernels

BACKENDS = apt_kernels.backends()["operations"]["value_loss"]["cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_of_equal_returns_is_zero(backend, dtype):
    """Their mean is rounded, so that around it they seem to vary; one other return and they do."""
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 40):
        mask = torch.rand(3, length, generator=generator) < 0.7
        values = torch.randn(3, length, generator=generator).to(dtype)
        value = torch.randn((), generator=generator).to(dtype) * 10 ** (length % 7)
        returns = torch.where(mask, value, torch.nan)
        _, metrics = apt_kernels.value_loss(values, returns, mask, backend=backend)
        assert metrics["explained_variance"] == 0, (length, value)
        if mask.sum() > 1:
            last = tuple(mask.nonzero()[-1])
            returns[last] = value.nextafter(value.new_tensor(torch.inf)) + 1
            _, metrics = apt_kernels.value_loss(values, returns, mask, backend=backend)
            assert metrics["explained_variance"] != 0
