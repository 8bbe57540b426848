"""Gradients of a pair loss that its forward pass formed, given away by the first backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep(ctx, grads: Tensor, *inputs: Tensor | None) -> None:
    """Until `scaled`: not as saved tensors, as these must not be changed in place.

    A graph that is traced and run again keeps them so.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(grads)
    else:
        ctx.grads = grads
        ctx.save_for_backward(*inputs)


def scaled(ctx, grad_loss: Tensor, again: Callable[..., Tensor]) -> Tensor:
    """The gradients times the upstream one, in their own memory: a copy costs a third of the call.

    A second pass over a retained graph has them from `again(*inputs)`.
    """
    if torch.compiler.is_compiling():
        return ctx.saved_tensors[0] * grad_loss
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        grads = again(*ctx.saved_tensors)
    try:
        return grads.mul_(grad_loss)
    except RuntimeError:  # a batch of upstream gradients (vmap) does not go into the memory of one
        return grads * grad_loss
