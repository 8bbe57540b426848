"""InfoNCE: the cross-entropy of each query's own key among all keys, without their matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from . import similarity
from .ring.info_nce import InfoNCERing
from .ring.ring import ring_of

FORWARD, BACKWARD = "info_nce_fwd", "info_nce_bwd"
dispatch.define(
    "info_nce_fwd(Tensor query, Tensor key, Tensor? negatives, Tensor? temperatures, "
    "float temperature, bool normalize, bool symmetric, SymInt label_offset, "
    "SymInt? self_offset, bool need_slopes, "
    "Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "info_nce_bwd(Tensor? grad_losses, Tensor? grad_column_losses, Tensor query, Tensor key, "
    "Tensor? negatives, Tensor? temperatures, float temperature, bool normalize, "
    "SymInt label_offset, SymInt? self_offset, Tensor row_stats, Tensor column_stats, "
    "bool need_query, bool need_key, bool need_negatives, "
    "bool unrounded=False) -> (Tensor, Tensor, Tensor)"
)
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
            are those of one process with the whole batch. Keys travel around the ranks and every
            rank holds its own and two blocks of them: memory does not grow with the ranks. Every
            rank must run backward.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, accuracy)`, float32 (float64 for float64 rows). accuracy, 0-dim, without a graph, is
        the share of rows (of this rank) whose key is strictly above every other class, so that
        equal embeddings score 0 (where their products are rounded alike); of both directions if
        symmetric; 0 for no rows.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("query", query)
    similarity.check_like("key", key, "query", query)
    similarity.check_options(temperature, reduction, process_group, "query", query)
    checks.flag("normalize", normalize)
    checks.flag("symmetric", symmetric)
    _check_classes(query, key, negatives, symmetric, label_offset, process_group)
    backend = dispatch.choose("info_nce", query.device, backend, query.dtype)
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
    ranks = ring_of(process_group, query.shape[0], query.device)
    options = (*similarity.scalar(temperature), bool(normalize), bool(symmetric))
    need_slopes = similarity.differentiable(temperature)
    if ranks is None or negatives is not None:
        losses, right = _InfoNCE.apply(
            query, key, negatives, *options, label_offset, need_slopes, backend
        )
    else:
        losses, right = InfoNCERing.apply(query, key, *options, need_slopes, backend, ranks)
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
        similarity.check_module(
            temperature, reduction, process_group, normalize=normalize, symmetric=symmetric
        )
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
        losses, right, slopes, row_stats, column_stats, _ = dispatch.kernel(FORWARD, backend)(
            query, key, negatives, temperature, number, normalize, symmetric, label_offset, None,
            need_slopes,
        )  # fmt: skip
        ctx.save_for_backward(query, key, negatives, temperature, slopes, row_stats, column_stats)
        ctx.options = (number, normalize, symmetric, label_offset, backend)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @differentiable_once
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
        grads = [grad if need else None for grad, need in zip(grads, needs[:3], strict=True)]
        if needs[3]:
            grads.append(similarity.grad_temperature(temperature, grad_losses, slopes))
        else:
            grads.append(None)
        return *grads, None, None, None, None, None, None


@dispatch.fake(FORWARD, "native")
def _fake_forward(
    query, key, negatives, temperature, number, normalize, symmetric, label_offset, self_offset,
    need_slopes, before=None,
):  # fmt: skip
    rows = query.shape[0]
    losses = query.new_empty(rows, dtype=accumulate_dtype(query))
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    column_stats = stats.new_empty((rows if symmetric and before is None else 0, 2))
    after = stats.new_empty(0 if before is None else before.shape)
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    return losses, torch.empty_like(losses), slopes, stats, column_stats, after


@dispatch.fake(FORWARD, "triton")
def _(*arguments):
    losses, correct, slopes, stats, column_stats, after = _fake_forward(*arguments)
    slopes = losses.new_empty(slopes.shape)
    stats, column_stats = (losses.new_empty((s.shape[0], 4)) for s in (stats, column_stats))
    return losses, correct, slopes, stats, column_stats, after


@dispatch.fake(BACKWARD)
def _(
    grad_losses, grad_column_losses, query, key, negatives, temperature, number, normalize,
    label_offset, self_offset, row_stats, column_stats, need_query, need_key, need_negatives,
    unrounded=False,
):  # fmt: skip
    def gradient(need, of):
        of = key if of is None else of
        dtype = accumulate_dtype(of) if unrounded else of.dtype
        return of.new_empty(of.shape if need else 0, dtype=dtype)

    return gradient(need_query, query), gradient(need_key, key), gradient(need_negatives, negatives)
