"""SigLIP's sigmoid loss of all pairs of queries and keys, without their matrix."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autocast import as_autocast
from ..common.autograd import differentiable_once, gradients
from . import similarity
from .ring import ring

FORWARD, BACKWARD = "siglip_loss_fwd", "siglip_loss_bwd"
dispatch.define(
    "siglip_loss_fwd(Tensor query, Tensor key, Tensor? temperature_tensor, float temperature, "
    "Tensor? logit_bias_tensor, float logit_bias, bool normalize, SymInt label_offset, "
    "bool need_slopes, Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "siglip_loss_bwd(Tensor? grad_losses, Tensor? grad_column_losses, Tensor query, Tensor key, "
    "Tensor? temperature_tensor, float temperature, Tensor? logit_bias_tensor, "
    "float logit_bias, bool normalize, SymInt label_offset, bool need_query, bool need_key, "
    "bool unrounded=False) -> (Tensor, Tensor)"
)
dispatch.register("siglip_loss", FORWARD, BACKWARD)


class SigLIPLossCall(NamedTuple):
    """The arguments of the forward kernel. before: statistics of keys that rows met already."""

    query: Tensor
    key: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    logit_bias_tensor: Tensor | None
    logit_bias: float
    normalize: bool
    label_offset: int
    need_slopes: bool
    before: Tensor | None = None


class SigLIPLossBackwardCall(NamedTuple):
    """The arguments of the backward kernel. unrounded: gradients in the accumulation dtype."""

    grad_losses: Tensor | None
    grad_column_losses: Tensor | None
    query: Tensor
    key: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    logit_bias_tensor: Tensor | None
    logit_bias: float
    normalize: bool
    label_offset: int
    need_query: bool
    need_key: bool
    unrounded: bool = False


@overload
def siglip_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    logit_bias: float | Tensor = ...,
    normalize: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def siglip_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    logit_bias: float | Tensor = ...,
    normalize: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def siglip_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    logit_bias: float | Tensor = ...,
    normalize: bool = ...,
    label_offset: int = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def siglip_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    logit_bias: float | Tensor = -10.0,
    normalize: bool = True,
    label_offset: int = 0,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss sum_j -log sigmoid(z_ij (q_i . k_j / temperature + logit_bias)) of each row.

    z is 1 for a row's own key and -1 for others. The matrix of similarities exists a tile at a
    time: memory is O((N + M) D), forward costs one product of all pairs, backward three. Under
    autocast all rows are cast to its dtype, as a product of matrices does; sums are float32.
    Source: Zhai 2023 (SigLIP), eq. 1.

    Args:
        query: `(N, D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        key: `(M, D)` in the dtype of query; any strides; differentiable.
        temperature: a finite number above 0, or a 0-dim tensor of one, differentiable. In a tensor,
            a wrong number is an error on the CPU; on a GPU the loss is not a number.
        logit_bias: a finite number, or a 0-dim tensor of one, differentiable.
        normalize: bring all rows to unit length; a row of length under 1e-12 counts as zero and has
            zero gradient.
        label_offset: the key of row i is i + label_offset, within [0, M).
        reduction: "mean" over rows (0 for no rows), "sum" or "none", `(N,)`; each row is the sum
            over its keys.
        process_group: every rank brings its own queries and keys, as many as it likes, and the keys
            of all take part (label_offset must be 0). Its loss is its part of the whole times the
            number of ranks: averages over ranks, DistributedDataParallel's of gradients too, equal
            the ones of one process with the whole batch. Keys travel around the ranks. Every rank
            holds its own and two blocks of them: memory does not grow with the ranks. Every rank
            must run backward.
        return_correct: also return how many predictions are right.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 rows). With `return_correct` the pair
        `(loss, correct)`: correct, a 0-dim int64 tensor, is the number of rows (of this rank) whose
        key is strictly above every other.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("query", query)
    similarity.check_like("key", key, "query", query)
    similarity.check_options(temperature, reduction, process_group, "query", query)
    checks.flag("normalize", normalize)
    checks.flag("return_correct", return_correct)
    if isinstance(logit_bias, Tensor):
        similarity.check_scalar("logit_bias", logit_bias, "query", query)
    else:
        checks.finite("logit_bias", logit_bias)
    similarity.check_label_offset(label_offset, query, key, process_group)
    query, key = as_autocast(query, key)
    backend = dispatch.choose("siglip_loss", query.device, backend, query.dtype)
    if backend == "reference":
        return reference.siglip_loss(
            query,
            key,
            temperature=temperature,
            logit_bias=logit_bias,
            normalize=normalize,
            label_offset=label_offset,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
        )
    ranks = ring.ring_of(process_group, query.shape[0], query.device)
    temperature_tensor, temperature_number = similarity.scalar(temperature)
    logit_bias_tensor, logit_bias_number = similarity.scalar(logit_bias)
    call = SigLIPLossCall(
        query=query,
        key=key,
        temperature_tensor=temperature_tensor,
        temperature=temperature_number,
        logit_bias_tensor=logit_bias_tensor,
        logit_bias=logit_bias_number,
        normalize=normalize,
        label_offset=label_offset,
        need_slopes=similarity.differentiable(temperature) or similarity.differentiable(logit_bias),
    )
    losses, correct = _SigLIPLoss.apply(*call, backend, ranks)
    return similarity.results(
        losses, correct, reduction=reduction, ranks=ranks, return_correct=return_correct
    )


class _SigLIPLoss(torch.autograd.Function):
    """Over ranks, the keys travel: see `ring.gradients`. The losses of a row are sums over keys."""

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend, ranks = arguments
        call = SigLIPLossCall(*fields)
        state = None if ranks is None else ring.no_classes(call.query, 5)
        blocks = [(call.key,)] if ranks is None else ranks.blocks(call.key)
        for step, (keys,) in enumerate(blocks):
            of_block = call._replace(
                key=keys, label_offset=_label(step, keys, call.label_offset), before=state
            )
            losses, correct, slopes, bias_slopes, state = dispatch.kernel(FORWARD, backend)(
                *of_block
            )
        ctx.save_for_backward(
            call.query, call.key, call.temperature_tensor, call.logit_bias_tensor, slopes,
            bias_slopes,
        )  # fmt: skip
        ctx.temperature, ctx.logit_bias = call.temperature, call.logit_bias
        ctx.normalize, ctx.label_offset = call.normalize, call.label_offset
        ctx.backend, ctx.ranks = backend, ranks
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        query, key, temperature_tensor, logit_bias_tensor, slopes, bias_slopes = ctx.saved_tensors
        needs: Any = SigLIPLossCall(*ctx.needs_input_grad[:-2])
        grad_rows = grad_losses.contiguous()
        grads = {}

        def part(step, keys):
            call = SigLIPLossBackwardCall(
                grad_losses=grad_rows,
                grad_column_losses=None,
                query=query,
                key=keys,
                temperature_tensor=temperature_tensor,
                temperature=ctx.temperature,
                logit_bias_tensor=logit_bias_tensor,
                logit_bias=ctx.logit_bias,
                normalize=ctx.normalize,
                label_offset=_label(step, keys, ctx.label_offset),
                need_query=needs.query,
                need_key=needs.key,
                unrounded=ctx.ranks is not None,
            )
            return dispatch.kernel(BACKWARD, ctx.backend)(*call)

        if needs.query or needs.key:
            if ctx.ranks is None:
                grad_query, grad_key = part(0, key)
            else:
                grad_query, grad_key = ring.gradients(ctx.ranks, part, key, need_sent=needs.key)
            grads["query"] = grad_query.to(query.dtype) if needs.query else None
            grads["key"] = grad_key.to(key.dtype) if needs.key else None
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        if needs.logit_bias_tensor:
            grad_bias = (grad_losses * bias_slopes).sum()
            grads["logit_bias_tensor"] = grad_bias.to(logit_bias_tensor.dtype)
        return *gradients(SigLIPLossCall, **grads), None  # None for the ranks


def _label(step, keys, label_offset):
    """From a row to its positive; beyond the keys of other ranks."""
    return len(keys) if step else label_offset


@dispatch.fake(FORWARD, "native")
def _fake_forward(*fields):
    call = SigLIPLossCall(*fields)
    rows = call.query.shape[0]
    losses = call.query.new_empty(rows, dtype=accumulate_dtype(call.query))
    slopes = losses.new_empty(rows if call.need_slopes else 0, dtype=torch.float64)
    after = slopes.new_empty(0 if call.before is None else call.before.shape)
    return losses, torch.empty_like(losses), slopes, torch.empty_like(slopes), after


@dispatch.fake(FORWARD, "triton")
def _(*fields):
    losses, correct, *slopes, after = _fake_forward(*fields)
    return losses, correct, *(losses.new_empty(s.shape) for s in slopes), after


@dispatch.fake(BACKWARD)
def _(*fields):
    call = SigLIPLossBackwardCall(*fields)
    query, key = call.query, call.key
    dtype = accumulate_dtype(query) if call.unrounded else query.dtype
    grad_query = query.new_empty(query.shape if call.need_query else 0, dtype=dtype)
    return grad_query, key.new_empty(key.shape if call.need_key else 0, dtype=dtype)


class SigLIPLoss(similarity.SimilarityLoss):
    """`siglip_loss` as a module. Its arguments are the options of the function.

    A temperature or bias that is an `nn.Parameter` is learned.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        logit_bias: float | Tensor = -10.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
        return_correct: bool = False,
        backend: str | None = None,
    ) -> None:
        if not isinstance(logit_bias, Tensor):
            checks.finite("logit_bias", logit_bias)
        super().__init__(
            temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
            backend=backend,
        )
        self.add_options(logit_bias=logit_bias)

    def forward(
        self, query: Tensor, key: Tensor, label_offset: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or `(loss, correct)`; arguments as `apt_kernels.siglip_loss`."""
        return siglip_loss(query, key, label_offset=label_offset, **self.arguments)
