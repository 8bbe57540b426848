"""NT-Xent over the ranks of a process group: the views travel half way around."""

from __future__ import annotations

import torch

from .... import dispatch
from ...common.autograd import differentiable_once, gradients
from .. import similarity
from ..calls import (
    INFO_NCE,
    NT_XENT,
    InfoNCEBackwardCall,
    InfoNCECall,
    NTXentBackwardCall,
    NTXentCall,
)
from .ring import Passenger, no_classes

PLANES = 4  # of the statistics of a row: max, sum, weighted sum of the others; its positive


class NTXentRing(torch.autograd.Function):
    """The views of this rank against those of all, a block at a time.

    Similarities are symmetric: of two ranks only one multiplies their pairs, for the rows of both,
    as one process does: half of the products of a whole round and half of its way. The statistics
    and the gradients of the rows that travel go with them and then home. Of an even number of
    ranks, two half a round apart would do the same: there, each serves its own rows alone.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend, ranks = arguments
        call = NTXentCall(*fields)
        # The pairs of one rank's views are a triangle; those of two ranks are a rectangle.
        rectangle = dispatch.kernel(INFO_NCE[0], backend)
        views = torch.cat([call.z1, call.z2])
        triangle = call._replace(before=no_classes(views, PLANES))
        *_, rows = dispatch.kernel(NT_XENT[0], backend)(*triangle)
        of_block = InfoNCECall(
            query=views,
            key=views[:0],
            negatives=None,
            temperature_tensor=call.temperature_tensor,
            temperature=call.temperature,
            normalize=call.normalize,
            symmetric=False,
            label_offset=0,
            self_offset=None,
            need_slopes=call.need_slopes,
        )
        columns = _passenger(ranks)
        for step, both, (block,) in _others(ranks, views):
            before = rows
            if both:
                found = columns.take()
                before = torch.cat([rows, no_classes(block, PLANES) if found is None else found])
            *_, after = rectangle(
                *of_block._replace(
                    key=block, symmetric=both, label_offset=len(block), before=before
                )
            )
            rows = after[: len(views)]
            if both:
                columns.give(after[len(views) :], step)
        elsewhere = columns.take()
        if elsewhere is not None:
            temperature: float | torch.Tensor = call.temperature
            if call.temperature_tensor is not None:
                temperature = call.temperature_tensor.double()
            rows = _together(rows, elsewhere, 1 / temperature)
        # No more classes: the results.
        losses, correct, slopes, stats, *_ = rectangle(*of_block._replace(before=rows))
        ctx.save_for_backward(call.z1, call.z2, call.temperature_tensor, slopes, stats)
        ctx.temperature, ctx.normalize = call.temperature, call.normalize
        ctx.backend, ctx.ranks = backend, ranks
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        z1, z2, temperature_tensor, slopes, stats = ctx.saved_tensors
        needs = NTXentCall(*ctx.needs_input_grad[:-2])
        grads = {}
        if needs.z1 or needs.z2:
            weights = grad_losses.contiguous()
            grad_z1, grad_z2 = _grad_views(ctx, weights, z1, z2, temperature_tensor, stats)
            grads["z1"] = grad_z1 if needs.z1 else None
            grads["z2"] = grad_z2 if needs.z2 else None
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        return *gradients(NTXentCall, **grads), None  # None for the ranks


def _grad_views(ctx, weights, z1, z2, temperature_tensor, stats):
    views = torch.cat([z1, z2])
    triangle = NTXentBackwardCall(
        grad_losses=weights,
        z1=z1,
        z2=z2,
        temperature_tensor=temperature_tensor,
        temperature=ctx.temperature,
        normalize=ctx.normalize,
        stats=stats,
        unrounded=True,
    )
    grad = dispatch.kernel(NT_XENT[1], ctx.backend)(*triangle)
    sums = _passenger(ctx.ranks)
    for step, both, (block, columns, column_stats) in _others(ctx.ranks, views, weights, stats):
        rectangle = InfoNCEBackwardCall(
            grad_losses=weights,
            grad_column_losses=columns,
            query=views,
            key=block,
            negatives=None,
            temperature_tensor=temperature_tensor,
            temperature=ctx.temperature,
            normalize=ctx.normalize,
            label_offset=len(block),
            self_offset=None,
            row_stats=stats,
            column_stats=column_stats,
            need_query=True,
            need_key=both,
            need_negatives=False,
            unrounded=True,
        )
        own, others, _ = dispatch.kernel(INFO_NCE[1], ctx.backend)(*rectangle)
        grad += own
        if both:
            before = sums.take()
            sums.give(others if before is None else others.add_(before), step)
    elsewhere = sums.take()
    if elsewhere is not None:
        grad += elsewhere
    return grad.to(z1.dtype).split([len(z1), len(z2)])


def _passenger(ranks):
    return Passenger(ranks, (ranks.world - 1) // 2)


def _others(ranks, *tensors):
    """(step, whether the rows that travel are served too, block) of the ranks half way around."""
    for step, block in enumerate(ranks.blocks(*tensors, steps=ranks.world // 2 + 1)):
        if step:
            yield step, 2 * step < ranks.world, block


def _together(some, more, scale):
    """The statistics of two disjoint sets of classes; the first one has the positives."""
    top = torch.maximum(some[:, 0], more[:, 0])
    total, weighted = torch.zeros_like(top), torch.zeros_like(top)
    for highest, part, part_weighted, _ in (some.unbind(1), more.unbind(1)):
        shift = torch.where(part > 0, highest - top, 0)  # without classes all is 0
        factor = torch.exp(shift * scale)
        total += factor * part
        weighted += factor * (part_weighted + shift * part)
    return torch.stack([top, total, weighted, some[:, 3]], dim=1)
