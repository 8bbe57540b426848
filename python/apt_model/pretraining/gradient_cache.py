"""Outputs of a large batch computed in parts, with the memory of one part (Gao et al. 2021).

A contrastive loss needs the embeddings of the whole batch at once, not their graphs. So the parts
run without a graph, and once the loss has given the gradient of every embedding, each part runs
again with its graph and passes its gradients on: those of the whole batch, for one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..training.state import random_state, set_random_state


def in_parts(
    run: Callable[[slice], Tensor],
    slices: Sequence[slice],
    device: torch.device,
    last: Callable[[bool], AbstractContextManager[Any]],
) -> Tensor:
    """Returns `run` of all slices as one; both times it draws the same random numbers.

    Args:
        run: computes the rows of a slice.
        slices: the parts, in order.
        device: whose random numbers are drawn.
        last: the context of one part's passes with a graph; told whether it is the last of them.
    """
    anchor = torch.zeros((), requires_grad=True)  # without it there were no backward pass
    return _InParts.apply(anchor, run, slices, device, last)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, run, slices, device, last):
        ctx.run, ctx.device, ctx.last = run, device, last
        ctx.slices, ctx.states, outputs = slices, [], []
        for rows in slices:
            ctx.states.append(random_state(device))
            outputs.append(run(rows))
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        after = random_state(ctx.device)
        for index, rows in enumerate(ctx.slices):
            set_random_state(ctx.states[index], ctx.device)
            with ctx.last(index == len(ctx.slices) - 1):
                with torch.enable_grad():
                    output = ctx.run(rows)
                if output.requires_grad:  # not of a frozen encoder
                    torch.autograd.backward(output, grad[rows])
        set_random_state(after, ctx.device)
        return (None,) * 5
