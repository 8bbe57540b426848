"""InfoNCE: the cross-entropy of each query's own key among all keys, without their matrix."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ... import checks, dispatch, reference
from ..common.autocast import as_autocast
from ..common.autograd import differentiable_once, gradients
from . import similarity
from .calls import INFO_NCE, InfoNCEBackwardCall, InfoNCECall
from .ring.info_nce import InfoNCERing
from .ring.ring import ring_of

dispatch.register("info_nce", *INFO_NCE)


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = ...,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    symmetric: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = ...,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    symmetric: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = ...,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    symmetric: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss logsumexp_j s_ij - s_i,i+label_offset of each row, where s = q . k / temperature.

    The matrix of similarities exists a tile at a time: memory is O((N + M) D), forward costs one
    product of all pairs, backward three. Under autocast all rows are cast to its dtype, as a
    product of matrices does; sums are float32. Sources: van den Oord 2018; Radford 2021 (CLIP:
    symmetric, a learned temperature); He 2020 (MoCo: negatives).

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
        symmetric: the mean of the losses of rows and of columns, for M = N without negatives.
        label_offset: the key of row i is i + label_offset, within [0, M).
        reduction: "mean" over rows (0 for no rows), "sum" or "none", `(N,)`.
        process_group: every rank brings its own queries and keys, as many as it likes, and the keys
            of all are the classes (label_offset must be 0). Its loss is its part of the whole times
            the number of ranks: averages over ranks, DistributedDataParallel's of gradients too,
            equal the ones of one process with the whole batch. Keys travel around the ranks. Every
            rank holds its own and two blocks of them: memory does not grow with the ranks. Every
            rank must run backward.
        return_correct: also return how many predictions are right.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 rows). With `return_correct` the pair
        `(loss, correct)`: correct, a 0-dim int64 tensor, is the number of rows (of this rank) whose
        key is strictly above every other class, so that equal embeddings count 0 (where their
        products are rounded alike). If symmetric, rows and columns count: it is at most 2N.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("query", query)
    similarity.check_like("key", key, "query", query)
    similarity.check_options(temperature, reduction, process_group, "query", query)
    checks.flag("normalize", normalize)
    checks.flag("symmetric", symmetric)
    checks.flag("return_correct", return_correct)
    _check_classes(query, key, negatives, symmetric, label_offset, process_group)
    query, key, negatives = as_autocast(query, key, negatives)
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
            return_correct=return_correct,
        )
    ranks = ring_of(process_group, query.shape[0], query.device)
    temperature_tensor, number = similarity.scalar(temperature)
    call = InfoNCECall(
        query=query,
        key=key,
        negatives=negatives,
        temperature_tensor=temperature_tensor,
        temperature=number,
        normalize=normalize,
        symmetric=symmetric,
        label_offset=label_offset,
        self_offset=None,
        need_slopes=similarity.differentiable(temperature),
    )
    if ranks is None or negatives is not None:
        losses, correct = _InfoNCE.apply(*call, backend)
    else:
        losses, correct = InfoNCERing.apply(*call, backend, ranks)
    return similarity.results(
        losses,
        correct,
        reduction=reduction,
        ranks=ranks,
        return_correct=return_correct,
        directions=2 if symmetric else 1,
    )


def _check_classes(query, key, negatives, symmetric, label_offset, process_group):
    similarity.check_label_offset(label_offset, query, key, process_group)
    if negatives is not None:
        similarity.check_like("negatives", negatives, "query", query, dtype=False)
        similarity.check_one_key_each("negatives", label_offset, query, key)
    if symmetric:
        checks.unused("negatives", negatives, "a symmetric loss has none")
        similarity.check_one_key_each("symmetric", label_offset, query, key)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = InfoNCECall(*fields)
        losses, correct, slopes, row_stats, column_stats, _ = dispatch.kernel(INFO_NCE[0], backend)(
            *call
        )
        ctx.save_for_backward(
            call.query, call.key, call.negatives, call.temperature_tensor, slopes, row_stats,
            column_stats,
        )  # fmt: skip
        ctx.temperature, ctx.normalize, ctx.symmetric = (
            call.temperature, call.normalize, call.symmetric,
        )  # fmt: skip
        ctx.label_offset, ctx.backend = call.label_offset, backend
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        query, key, negatives, temperature_tensor, slopes, row_stats, column_stats = (
            ctx.saved_tensors
        )
        needs: Any = InfoNCECall(*ctx.needs_input_grad[:-1])
        grad_losses = grad_losses.contiguous()
        grads = {}
        if needs.query or needs.key or needs.negatives:
            grad_rows = grad_losses * 0.5 if ctx.symmetric else grad_losses
            call = InfoNCEBackwardCall(
                grad_losses=grad_rows,
                grad_column_losses=grad_rows if ctx.symmetric else None,
                query=query,
                key=key,
                negatives=negatives,
                temperature_tensor=temperature_tensor,
                temperature=ctx.temperature,
                normalize=ctx.normalize,
                label_offset=ctx.label_offset,
                self_offset=None,
                row_stats=row_stats,
                column_stats=column_stats,
                need_query=needs.query,
                need_key=needs.key,
                need_negatives=needs.negatives,
            )
            grad_query, grad_key, grad_negatives = dispatch.kernel(INFO_NCE[1], ctx.backend)(*call)
            grads["query"] = grad_query if needs.query else None
            grads["key"] = grad_key if needs.key else None
            grads["negatives"] = grad_negatives if needs.negatives else None
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        return gradients(InfoNCECall, **grads)


class InfoNCELoss(similarity.SimilarityLoss):
    """`info_nce` as a module. Its arguments are the options of the function.

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
        return_correct: bool = False,
        backend: str | None = None,
    ) -> None:
        checks.flag("symmetric", symmetric)
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
            backend=backend,
        )
        self.add_options(symmetric=symmetric)

    def forward(
        self, query: Tensor, key: Tensor, negatives: Tensor | None = None, label_offset: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or `(loss, correct)`; arguments as `apt_kernels.info_nce`."""
        return info_nce(
            query, key, negatives=negatives, label_offset=label_offset, **self.arguments
        )
