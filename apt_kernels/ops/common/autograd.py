"""Shared by the autograd functions of all operations: named gradients, and losses that form their
gradients in the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ONCE = (
    "the kernels of apt_kernels compute gradients once; a second derivative (create_graph=True) "
    "needs backend='reference'"
)


def gradients(call_type: type[NamedTuple], **grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The results of backward: a gradient or None for each field of the call, None for the backend.

    A name that is no field raises ValueError.
    """
    fields = call_type._fields
    slots: list[Tensor | None] = [None] * (len(fields) + 1)
    for name, grad in grads.items():
        slots[fields.index(name)] = grad
    return tuple(slots)


def differentiable_once(backward: Callable) -> Callable:
    """Marks a backward pass whose results must not be differentiated again.

    They come with a graph that raises, also where the upstream gradient has none (PyTorch's own
    `once_differentiable` gives constants there, and a gradient penalty would be wrong in silence).
    Without `create_graph=True` the mark costs nothing.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        results = found if isinstance(found, tuple) else (found,)
        raising = tuple(_raising(g) if isinstance(g, Tensor) else g for g in results)
        return raising if isinstance(found, tuple) else raising[0]

    return once


def _raising(grad: Tensor) -> Tensor:
    """The gradient with a graph that raises where it is differentiated."""
    return torch._C._functions.DelayedError(_ONCE, 1)(grad.detach().requires_grad_())


def save_call(ctx: Any, call: Any) -> None:
    """Saves the arguments of a kernel for the backward pass, where `saved_call` gives them."""
    tensors = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
    ctx.save_for_backward(*tensors.values())
    ctx.saved_names, ctx.options = tuple(tensors), call._replace(**dict.fromkeys(tensors))


def saved_call(ctx: Any) -> Any:
    """The call that `save_call` saved."""
    return ctx.options._replace(**dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True)))


def keep(ctx: Any, formed: Tensor, call: NamedTuple, *inputs: Tensor | None) -> None:
    """Keeps the gradients that the forward pass of a pair loss formed, until `scaled` takes them.

    They are an attribute of ctx, because saved tensors must not be changed in place. Under
    torch.compile they are a saved tensor, since such a graph may run again.

    Args:
        ctx: of the autograd function.
        formed: gradients of the loss, for an upstream gradient of 1.
        call: arguments of the kernel, which forms the gradients again for a retained graph.
        *inputs: tensors of `call`; PyTorch then notices where one was changed in place.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(formed)
    else:
        ctx.formed, ctx.call = formed, call
        ctx.save_for_backward(*inputs)


def scaled(ctx: Any, grad_loss: Tensor, form: Callable[[NamedTuple], Tensor]) -> Tensor:
    """The kept gradients times the upstream gradient, in their own memory.

    A copy would cost a third of the call. `form(call)` forms the gradients again for the second
    pass over a retained graph.
    """
    if torch.compiler.is_compiling():
        return ctx.saved_tensors[0] * grad_loss
    formed, ctx.formed = ctx.formed, None
    if formed is None:
        _ = ctx.saved_tensors  # raises where an input was changed in place
        formed = form(ctx.call)
    try:
        return formed.mul_(grad_loss)
    except RuntimeError:  # a batch of upstream gradients (vmap) does not go into the memory of one
        return formed * grad_loss
