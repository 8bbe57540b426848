"""InfoNCE over the ranks of a process group: the keys travel from rank to rank."""

from __future__ import annotations

import torch

from .... import dispatch
from ...common.autograd import differentiable_once
from .. import similarity
from .ring import Passenger, gradients, no_classes

PLANES = 4  # of the statistics of a row: max, sum, weighted sum of the others; its positive


class InfoNCERing(torch.autograd.Function):
    """The queries of this rank against the keys of all, a block at a time.

    Each pair is multiplied once forward, as in one process: where columns have a softmax too, their
    statistics travel with them, 32 bytes a row, instead of the queries. See `ring.gradients` for
    the way back. Positives lie in a rank's own block alone.
    """

    @staticmethod
    def forward(
        ctx, query, key, temperature, number, normalize, symmetric, need_slopes, backend, ranks
    ):
        forward = dispatch.kernel("info_nce_fwd", backend)
        options = (None, temperature, number, normalize)
        rows, columns = no_classes(query, PLANES), Passenger(ranks, ranks.world - 1)
        for step, (keys,) in enumerate(ranks.blocks(key)):
            if symmetric:
                found = columns.take()
                rows = torch.cat([rows, no_classes(keys, PLANES) if found is None else found])
            losses, right, slopes, row_stats, _, rows = forward(
                query, keys, *options, symmetric, _label(step, keys), None, need_slopes, rows
            )
            if symmetric:
                rows, found = rows.split([len(query), len(keys)])
                columns.give(found, step)
        column_stats = row_stats[:0]
        if symmetric:  # no more classes: the results of the keys
            more, more_right, more_slopes, column_stats, *_ = forward(
                key, query[:0], *options, False, 0, None, need_slopes, columns.take()
            )
            losses, right = 0.5 * (losses + more), 0.5 * (right + more_right)
            slopes = 0.5 * (slopes + more_slopes)
        ctx.save_for_backward(query, key, temperature, slopes, row_stats, column_stats)
        ctx.options = (number, normalize, symmetric, backend, ranks)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        query, key, temperature, slopes, row_stats, column_stats = ctx.saved_tensors
        number, normalize, symmetric, backend, ranks = ctx.options
        needs = ctx.needs_input_grad
        rows = (grad_losses * 0.5 if symmetric else grad_losses).contiguous()
        grad_query = grad_key = grad_temperature = None

        def part(step, keys, columns=None, stats=column_stats):
            return dispatch.kernel("info_nce_bwd", backend)(
                rows, columns, query, keys, None, temperature, number, normalize,
                _label(step, keys), None, row_stats, stats, needs[0], needs[1], False, True,
            )[:2]  # fmt: skip

        if needs[0] or needs[1]:
            travels = (key, rows, column_stats) if symmetric else (key,)
            grad_query, grad_key = gradients(ranks, part, *travels, need_sent=needs[1])
        if needs[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        return (
            grad_query.to(query.dtype) if needs[0] else None,
            grad_key.to(key.dtype) if needs[1] else None,
            grad_temperature, None, None, None, None, None, None,
        )  # fmt: skip


def _label(step, keys):
    """From a row to its positive; beyond the keys of other ranks."""
    return len(keys) if step else 0
