"""InfoNCE: the cross-entropy of each query's own key among all keys, without their matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import checks, dispatch, reference
from ..reference.numerics import accumulate_dtype
from . import similarity

FORWARD, BACKWARD = "info_nce_fwd", "info_nce_bwd"
dispatch.register("info_nce", FORWARD, BACKWARD)


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    label_offset: int = 0,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """logsumexp_j s_ij - s_i,i+label_offset, where s = q . k / temperature, and the accuracy.

    The matrix of similarities exists a tile at a time: memory is O((N + M) D), forward costs one
    product of all pairs, backward three. Sources: van den Oord 2018; Radford 2021 (CLIP: symmetric,
    a learned temperature); He 2020 (MoCo: negatives).

    Args:
        query: `(N, D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        key: `(M, D)` in the dtype of query; any strides; differentiable.
        negatives: `(K, D)` in any of these dtypes and any strides (`queue.T`); differentiable.
            Given, the classes of row i are key i and the negatives alone, and M = N.
        temperature: a finite number above 0, or a 0-dim tensor of one, differentiable (CLIP's logit
            scale is its inverse). In a tensor, a wrong number is an error on the CPU; on a GPU the
            loss is not a number.
        normalize: bring all rows to unit length; a row of length under 1e-12 counts as zero and has
            zero gradient.
        symmetric: the mean of the loss of rows and that of columns, for M = N without negatives.
        label_offset: the key of row i is i + label_offset, within [0, M).
        reduction: "mean" over rows (0 for no rows), "sum" or "none", `(N,)`.
        process_group: every rank brings its own queries and keys, as many as it likes, and the keys
            of all are the classes (label_offset must be 0). Its loss is its part of the whole times
            the number of ranks: averages over ranks, DistributedDataParallel's of gradients too,
            are those of one process with the whole batch. Every rank must run backward.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, accuracy)`, float32 (float64 for float64 rows). accuracy, 0-dim, without a graph, is
        the share of rows (of this rank) whose key is strictly above every other class, so that
        equal embeddings score 0; of both directions if symmetric; 0 for no rows.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("query", query)
    similarity.check_like("key", key, "query", query)
    similarity.check_options(temperature, reduction, process_group, "query", query)
    checks.flag("normalize", normalize)
    checks.flag("symmetric", symmetric)
    _check_classes(query, key, negatives, symmetric, label_offset, process_group)
    backend = dispatch.choose("info_nce", query.device, backend)
    if backend == "reference":
        return reference.info_nce(
            query,
            key,
            negatives=negatives,
            temperature=temperature,
            normalize=normalize,
            symmetric=symmetric,
            label_offset=label_offset,
            reduction=reduction,
            process_group=process_group,
        )
    ranks = similarity.ranks_of(process_group, query)
    options = (*similarity.scalar(temperature), bool(normalize), bool(symmetric))
    need_slopes = similarity.differentiable(temperature)
    if ranks is None or negatives is not None:
        losses, right = _InfoNCE.apply(
            query, key, negatives, *options, label_offset, need_slopes, backend
        )
    else:
        losses, right = _InfoNCEOverRanks.apply(query, key, *options, need_slopes, backend, ranks)
    total, world = (query.shape[0], 1) if ranks is None else (ranks.total, ranks.world)
    return similarity.reduced(losses, reduction, total, world), similarity.share(right)


def _check_classes(query, key, negatives, symmetric, label_offset, process_group):
    similarity.check_label_offset(label_offset, query, key, process_group)
    if negatives is not None:
        similarity.check_like("negatives", negatives, "query", query, dtype=False)
        similarity.check_one_key_each("negatives", label_offset, query, key)
    if symmetric:
        checks.unused("negatives", negatives, "a symmetric loss has none")
        similarity.check_one_key_each("symmetric", label_offset, query, key)


class InfoNCELoss(nn.Module):
    """`info_nce` as a module; its arguments are the options of the function.

    A temperature that is an `nn.Parameter` is learned.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.symmetric = temperature, normalize, symmetric
        self.reduction, self.process_group, self.backend = reduction, process_group, backend

    def forward(
        self, query: Tensor, key: Tensor, negatives: Tensor | None = None, label_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(loss, accuracy)."""
        return info_nce(
            query,
            key,
            negatives=negatives,
            temperature=self.temperature,
            normalize=self.normalize,
            symmetric=self.symmetric,
            label_offset=label_offset,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}"


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, negatives, temperature, number, normalize, symmetric, label_offset,
        need_slopes, backend,
    ):  # fmt: skip
        losses, right, slopes, row_stats, column_stats = dispatch.kernel(FORWARD, backend)(
            query, key, negatives, temperature, number, normalize, symmetric, label_offset, None,
            need_slopes,
        )  # fmt: skip
        ctx.save_for_backward(query, key, negatives, temperature, slopes, row_stats, column_stats)
        ctx.options = (number, normalize, symmetric, label_offset, backend)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _):
        query, key, negatives, temperature, slopes, row_stats, column_stats = ctx.saved_tensors
        number, normalize, symmetric, label_offset, backend = ctx.options
        needs = ctx.needs_input_grad
        grad_losses = grad_losses.contiguous()
        rows = grad_losses * 0.5 if symmetric else grad_losses
        grads = (None, None, None)
        if any(needs[:3]):
            grads = dispatch.kernel(BACKWARD, backend)(
                rows, rows if symmetric else None, query, key, negatives, temperature, number,
                normalize, label_offset, None, row_stats, column_stats, needs[0], needs[1],
                needs[2],
            )  # fmt: skip
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
        if needs[3]:
            grads.append(similarity.grad_temperature(temperature, grad_losses, slopes))
        else:
            grads.append(None)
        return *grads, None, None, None, None, None, None


class _InfoNCEOverRanks(torch.autograd.Function):
    """The rows of this rank against those of all.

    What a row does to the losses of other ranks is in the coefficients of its own pairs, which take
    the others' log-sum-exps and upstream gradients: O(N) numbers are exchanged backward, no rows.
    """

    @staticmethod
    def forward(
        ctx, query, key, temperature, number, normalize, symmetric, need_slopes, backend, ranks
    ):
        forward = dispatch.kernel(FORWARD, backend)
        options = (None, temperature, number, normalize, False, ranks.start, None, need_slopes)
        keys = ranks.gather(key)
        queries = ranks.gather(query) if symmetric or ctx.needs_input_grad[1] else keys[:0]
        losses, right, slopes, row_stats, column_stats = forward(query, keys, *options)
        if symmetric:
            more, more_right, more_slopes, column_stats, _ = forward(key, queries, *options)
            losses, right = 0.5 * (losses + more), 0.5 * (right + more_right)
            slopes = 0.5 * (slopes + more_slopes)
        ctx.save_for_backward(
            query, key, keys, queries, temperature, slopes, row_stats, column_stats
        )
        ctx.options = (number, normalize, symmetric, backend, ranks)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _):
        query, key, keys, queries, temperature, slopes, row_stats, column_stats = ctx.saved_tensors
        number, normalize, symmetric, backend, ranks = ctx.options
        needs = ctx.needs_input_grad
        backward = dispatch.kernel(BACKWARD, backend)
        options = (None, temperature, number, normalize, ranks.start, None)
        rows = (grad_losses * 0.5 if symmetric else grad_losses).contiguous()
        grad_query = grad_key = grad_temperature = None
        if needs[0]:
            columns, stats = None, column_stats
            if symmetric:
                columns, stats = ranks.gather(rows), ranks.gather(column_stats)
            grad_query, _, _ = backward(
                rows, columns, query, keys, *options, row_stats, stats, True, False, False
            )
        if needs[1]:
            columns, stats = ranks.gather(rows), ranks.gather(row_stats)
            grad_key, _, _ = backward(
                rows if symmetric else None, columns, key, queries, *options, column_stats, stats,
                True, False, False,
            )  # fmt: skip
        if needs[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        return grad_query, grad_key, grad_temperature, None, None, None, None, None, None


@dispatch.fake(FORWARD)
def _(
    query, key, negatives, temperature, number, normalize, symmetric, label_offset, self_offset,
    need_slopes,
):  # fmt: skip
    rows = query.shape[0]
    losses = query.new_empty(rows, dtype=accumulate_dtype(query))
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    column_stats = stats.new_empty((rows if symmetric else 0, 2))
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    return losses, torch.empty_like(losses), slopes, stats, column_stats


@dispatch.fake(BACKWARD)
def _(
    grad_losses, grad_column_losses, query, key, negatives, temperature, number, normalize,
    label_offset, self_offset, row_stats, column_stats, need_query, need_key, need_negatives,
):  # fmt: skip
    def gradient(need, of):
        of = key if of is None else of
        return of.new_empty(of.shape if need else 0)

    return gradient(need_query, query), gradient(need_key, key), gradient(need_negatives, negatives)
