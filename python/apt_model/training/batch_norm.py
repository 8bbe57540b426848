"""Batch normalization over the batches of all processes, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import processes

Norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOfAll.forward(ctx, grad)


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose mean and variance are of all processes; `nn.SyncBatchNorm` needs a GPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalized input, `(N, C, ...)`."""
        if not self.training or processes.count() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.transpose(0, 1).flatten(1).float()  # (C, everything else)
        count = torch.tensor(float(values.shape[1]), device=input.device)
        dist.all_reduce(count)
        mean = _SumOfAll.apply(values.sum(1)) / count
        centred = values - mean.unsqueeze(1)
        variance = _SumOfAll.apply(centred.square().sum(1)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        shape = (1, -1, *[1] * (input.dim() - 2))
        scale = torch.rsqrt(variance + self.eps)
        result = (input.float() - mean.view(shape)) * scale.view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards the statistics of this batch."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        kept = self.momentum
        if kept is None:
            kept = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), kept)
        self.running_var.lerp_(variance.to(self.running_var), kept)


def synchronize(modules: Iterable[nn.Module]) -> None:
    """Lets all batch norms in the modules be of all processes; of one process nothing changes."""
    if processes.count() == 1:
        return
    for part in (part for module in modules for part in module.modules()):
        if type(part) in Norm:
            part.__class__ = SyncedBatchNorm
