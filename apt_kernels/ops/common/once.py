"""Backward passes without a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable) -> Callable:
    """PyTorch's `once_differentiable`, without its 5 us where no graph of the gradient is built.

    For losses so small that a call is overhead and nothing else.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx, *grads):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return choose
