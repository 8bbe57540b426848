"""NT-Xent over the ranks of a process group: the views travel half way around."""

from __future__ import annotations

import torch

from .... import dispatch
from ...common.autograd import differentiable_once
from .. import similarity
from .ring import Passenger, no_classes

# Of the views of two ranks; among those of one they are a triangle.
RECTANGLE = ("info_nce_fwd", "info_nce_bwd")
PLANES = 4  # of the statistics of a row: max, sum, weighted sum of the others; its positive


class NTXentRing(torch.autograd.Function):
    """The views of this rank against those of all, a block at a time.

    Similarities are symmetric: of two ranks only one multiplies their pairs, for the rows of both,
    as one process does: half of the products of a whole round and half of its way. The statistics
    and the gradients of the rows that travel go with them and then home. Of an even number of
    ranks, two half a round apart would do the same: there, each serves its own rows alone.
    """

    @staticmethod
    def forward(ctx, z1, z2, temperature, number, normalize, need_slopes, backend, ranks):
        rectangle = dispatch.kernel(RECTANGLE[0], backend)
        options = (None, temperature, number, normalize)
        views = torch.cat([z1, z2])
        *_, rows = dispatch.kernel("nt_xent_fwd", backend)(
            z1, z2, *options[1:], need_slopes, no_classes(views, PLANES)
        )
        columns = _passenger(ranks)
        for step, both, (block,) in _others(ranks, views):
            before = rows
            if both:
                found = columns.take()
                before = torch.cat([rows, no_classes(block, PLANES) if found is None else found])
            *_, after = rectangle(
                views, block, *options, both, len(block), None, need_slopes, before
            )
            rows = after[: len(views)]
            if both:
                columns.give(after[len(views) :], step)
        elsewhere = columns.take()
        if elsewhere is not None:
            scale = 1 / (number if temperature is None else temperature.double())
            rows = _together(rows, elsewhere, scale)
        losses, right, slopes, stats, *_ = rectangle(  # no more classes: the results
            views, views[:0], *options, False, 0, None, need_slopes, rows
        )
        ctx.save_for_backward(z1, z2, temperature, slopes, stats)
        ctx.options = (number, normalize, backend, ranks)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        z1, z2, temperature, slopes, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads, grad_temperature = (None, None), None
        if needs[0] or needs[1]:
            grads = _grad_views(ctx, grad_losses.contiguous(), z1, z2, temperature, stats)
        if needs[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        grads = [grad if need else None for grad, need in zip(grads, needs[:2], strict=True)]
        return *grads, grad_temperature, None, None, None, None, None


def _grad_views(ctx, weights, z1, z2, temperature, stats):
    number, normalize, backend, ranks = ctx.options
    views, options = torch.cat([z1, z2]), (temperature, number, normalize)
    grad = dispatch.kernel("nt_xent_bwd", backend)(weights, z1, z2, *options, stats, True)
    sums = _passenger(ranks)
    for step, both, (block, columns, column_stats) in _others(ranks, views, weights, stats):
        own, others, _ = dispatch.kernel(RECTANGLE[1], backend)(
            weights, columns, views, block, None, *options, len(block), None, stats, column_stats,
            True, both, False, True,
        )  # fmt: skip
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
