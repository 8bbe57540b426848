"""InfoNCE over the ranks of a process group: the keys travel from rank to rank."""

from __future__ import annotations

from typing import Any

import torch

from .... import dispatch
from ...common.autograd import differentiable_once
from ...common.autograd import gradients as of_fields
from .. import similarity
from ..calls import INFO_NCE, InfoNCEBackwardCall, InfoNCECall
from .ring import Passenger, gradients, no_classes

PLANES = 4  # of the statistics of a row: max, sum, weighted sum of the others; its positive


class InfoNCERing(torch.autograd.Function):
    """The queries of this rank against the keys of all, a block at a time.

    Each pair is multiplied once forward, as in one process: where columns have a softmax too, their
    statistics travel with them, 32 bytes a row, instead of the queries. See `ring.gradients` for
    the way back. Positives lie in a rank's own block alone.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend, ranks = arguments
        call = InfoNCECall(*fields)
        query, key, symmetric = call.query, call.key, call.symmetric
        forward = dispatch.kernel(INFO_NCE[0], backend)
        rows, columns = no_classes(query, PLANES), Passenger(ranks, ranks.world - 1)
        for step, (keys,) in enumerate(ranks.blocks(key)):
            if symmetric:
                found = columns.take()
                rows = torch.cat([rows, no_classes(keys, PLANES) if found is None else found])
            block = call._replace(key=keys, label_offset=_label(step, keys), before=rows)
            losses, correct, slopes, row_stats, _, rows = forward(*block)
            if symmetric:
                rows, found = rows.split([len(query), len(keys)])
                columns.give(found, step)
        column_stats = row_stats[:0]
        if symmetric:  # no more classes: the results of the keys
            rest = call._replace(
                query=key, key=query[:0], symmetric=False, label_offset=0, before=columns.take()
            )
            more, more_correct, more_slopes, column_stats, *_ = forward(*rest)
            losses, correct = 0.5 * (losses + more), 0.5 * (correct + more_correct)
            slopes = 0.5 * (slopes + more_slopes)
        ctx.save_for_backward(query, key, call.temperature_tensor, slopes, row_stats, column_stats)
        ctx.temperature, ctx.normalize, ctx.symmetric = call.temperature, call.normalize, symmetric
        ctx.backend, ctx.ranks = backend, ranks
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        query, key, temperature_tensor, slopes, row_stats, column_stats = ctx.saved_tensors
        needs: Any = InfoNCECall(*ctx.needs_input_grad[:-2])
        rows = (grad_losses * 0.5 if ctx.symmetric else grad_losses).contiguous()
        grads = {}

        def part(step, keys, columns=None, stats=column_stats):
            call = InfoNCEBackwardCall(
                grad_losses=rows,
                grad_column_losses=columns,
                query=query,
                key=keys,
                negatives=None,
                temperature_tensor=temperature_tensor,
                temperature=ctx.temperature,
                normalize=ctx.normalize,
                label_offset=_label(step, keys),
                self_offset=None,
                row_stats=row_stats,
                column_stats=stats,
                need_query=needs.query,
                need_key=needs.key,
                need_negatives=False,
                unrounded=True,
            )
            grad_query, grad_key, _ = dispatch.kernel(INFO_NCE[1], ctx.backend)(*call)
            return grad_query, grad_key

        if needs.query or needs.key:
            travels = (key, rows, column_stats) if ctx.symmetric else (key,)
            grad_query, grad_key = gradients(ctx.ranks, part, *travels, need_sent=needs.key)
            grads["query"] = grad_query.to(query.dtype) if needs.query else None
            grads["key"] = grad_key.to(key.dtype) if needs.key else None
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        return *of_fields(InfoNCECall, **grads), None  # None for the ranks


def _label(step, keys):
    """From a row to its positive; beyond the keys of other ranks."""
    return len(keys) if step else 0
