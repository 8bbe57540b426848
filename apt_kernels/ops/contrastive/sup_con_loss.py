"""The supervised contrastive loss: several positives a row, without the matrix of similarities."""

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
from .ring.ring import no_classes, ring_of

FORWARD, BACKWARD = "sup_con_loss_fwd", "sup_con_loss_bwd"
dispatch.define(
    "sup_con_loss_fwd(Tensor features, Tensor labels, Tensor? classes, Tensor? class_labels, "
    "Tensor? temperature_tensor, float temperature, bool normalize, SymInt self_offset, "
    "bool need_slopes, Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "sup_con_loss_bwd(Tensor grad_losses, Tensor? grad_class_losses, Tensor features, "
    "Tensor labels, Tensor? classes, Tensor? class_labels, Tensor? temperature_tensor, "
    "float temperature, bool normalize, SymInt self_offset, Tensor stats, "
    "Tensor? class_stats, bool unrounded=False) -> Tensor"
)
dispatch.register("sup_con_loss", FORWARD, BACKWARD)


class SupConLossCall(NamedTuple):
    """The arguments of the forward kernel. classes: rows of another rank, or None for its own.

    before: statistics of classes that rows met already.
    """

    features: Tensor
    labels: Tensor
    classes: Tensor | None
    class_labels: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    self_offset: int
    need_slopes: bool
    before: Tensor | None = None


class SupConLossBackwardCall(NamedTuple):
    """The arguments of the backward kernel. unrounded: the gradient in the accumulation dtype."""

    grad_losses: Tensor
    grad_class_losses: Tensor | None
    features: Tensor
    labels: Tensor
    classes: Tensor | None
    class_labels: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    self_offset: int
    stats: Tensor
    class_stats: Tensor | None
    unrounded: bool = False


@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss -1/|P_i| sum_(p in P_i) log(exp(s_ip) / sum_(a != i) exp(s_ia)) of each anchor.

    P_i are the other rows of anchor i's label. Two views of every sample with labels of their own
    give NT-Xent. The matrix of similarities is symmetric and exists a tile at a time: each pair of
    rows is multiplied once forward and once backward; memory is O(N D). Under autocast
    the rows are cast to its dtype, as a product of matrices does; sums are float32. Source: Khosla
    2020, L_out; the authors' code multiplies it by temperature / 0.07, we do not.

    Args:
        features: `(N, D)` float32, bfloat16, float16 or float64; several views of a sample are
            several rows; any strides; differentiable.
        labels: `(N,)` integers of any value.
        temperature: a finite number above 0, or a 0-dim tensor of one, differentiable. In a tensor,
            a wrong number is an error on the CPU; on a GPU the loss is not a number.
        normalize: bring all rows to unit length; a row of length under 1e-12 counts as zero and has
            zero gradient.
        reduction: "mean" over the anchors that have a positive (0 if none has), "sum" or "none",
            `(N,)`, 0 without a positive.
        process_group: every rank brings its own rows, as many as it likes, and the rows of all are
            the classes. Its loss is its part of the whole times the number of ranks: averages over
            ranks, DistributedDataParallel's of gradients too, equal the ones of one process with
            the whole batch. Rows travel around the ranks. Every rank holds its own and two blocks
            of them: memory does not grow with the ranks. Every rank must run backward.
        return_correct: also return how many predictions are right.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 features). With `return_correct` the pair
        `(loss, correct)`: correct, a 0-dim int64 tensor, is the number of anchors with a positive
        (of this rank) whose best positive is strictly above every negative.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("features", features)
    checks.tensor("labels", labels, checks.INTEGERS)
    checks.shape("labels", labels, features.shape[:1], "one label a row")
    checks.same_device("labels", labels, "features", features)
    similarity.check_options(temperature, reduction, process_group, "features", features)
    checks.flag("normalize", normalize)
    checks.flag("return_correct", return_correct)
    (features,) = as_autocast(features)
    backend = dispatch.choose("sup_con_loss", features.device, backend, features.dtype)
    if backend == "reference":
        return reference.sup_con_loss(
            features,
            labels,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
        )
    ranks = ring_of(process_group, features.shape[0], features.device)
    temperature_tensor, number = similarity.scalar(temperature)
    call = SupConLossCall(
        features=features,
        labels=labels.long().contiguous(),
        classes=None,
        class_labels=None,
        temperature_tensor=temperature_tensor,
        temperature=number,
        normalize=normalize,
        self_offset=0,
        need_slopes=similarity.differentiable(temperature),
    )
    losses, correct, anchor = _SupConLoss.apply(*call, backend, ranks)
    total = None
    if reduction == "mean":
        total = anchor.sum() if ranks is None else ranks.sum(anchor.sum())
    return similarity.results(
        losses,
        correct,
        reduction=reduction,
        ranks=ranks,
        return_correct=return_correct,
        total=total,
    )


class _SupConLoss(torch.autograd.Function):
    """Over ranks, rows and labels travel, backward with their upstream gradients and statistics.

    The coefficient of a pair holds what it does to the losses of both of its rows, so that every
    rank makes the whole gradient of its own rows and no gradient travels.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend, ranks = arguments
        call = SupConLossCall(*fields)
        state = None if ranks is None else no_classes(call.features, 7, lowest=(0, 3, 4))
        for step, (classes, class_labels) in enumerate(_blocks(ranks, call.features, call.labels)):
            of_block = call._replace(before=state)
            if step:  # among the rows of one rank, each pair is multiplied once
                of_block = of_block._replace(
                    classes=classes, class_labels=class_labels, self_offset=len(classes)
                )
            losses, correct, slopes, stats, state = dispatch.kernel(FORWARD, backend)(*of_block)
        ctx.save_for_backward(call.features, call.labels, call.temperature_tensor, slopes, stats)
        ctx.temperature, ctx.normalize = call.temperature, call.normalize
        ctx.backend, ctx.ranks = backend, ranks
        anchor = stats[:, 1] > 0
        ctx.mark_non_differentiable(correct, anchor)
        return losses, correct, anchor

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, *_):
        _, _, temperature_tensor, slopes, _ = ctx.saved_tensors
        needs = SupConLossCall(*ctx.needs_input_grad[:-2])
        grads = {}
        if needs.features:
            grads["features"] = _grad_features(ctx, grad_losses.contiguous())
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        return *gradients(SupConLossCall, **grads), None  # None for the ranks


def _grad_features(ctx, grad_losses: Tensor) -> Tensor:
    features, labels, temperature_tensor, _, stats = ctx.saved_tensors
    own = SupConLossBackwardCall(
        grad_losses=grad_losses,
        grad_class_losses=None,
        features=features,
        labels=labels,
        classes=None,
        class_labels=None,
        temperature_tensor=temperature_tensor,
        temperature=ctx.temperature,
        normalize=ctx.normalize,
        self_offset=0,
        stats=stats,
        class_stats=None,
        unrounded=ctx.ranks is not None,
    )
    kernel = dispatch.kernel(BACKWARD, ctx.backend)
    total: Any = None  # a tensor after the first block, which is this rank's own
    blocks = _blocks(ctx.ranks, features, labels, grad_losses, stats)
    for step, (classes, class_labels, columns, class_stats) in enumerate(blocks):
        if step == 0:
            total = kernel(*own)
            continue
        of_block = own._replace(
            grad_class_losses=columns,
            classes=classes,
            class_labels=class_labels,
            self_offset=len(classes),
            class_stats=class_stats,
        )
        total = total.add_(kernel(*of_block))
    return total.to(features.dtype)


def _blocks(ranks, *tensors):
    return [tensors] if ranks is None else ranks.blocks(*tensors)


@dispatch.fake(FORWARD, "native")
def _fake_forward(*fields):
    call = SupConLossCall(*fields)
    rows = call.features.shape[0]
    losses = call.features.new_empty(rows, dtype=accumulate_dtype(call.features))
    slopes = losses.new_empty(rows if call.need_slopes else 0, dtype=torch.float64)
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    after = stats.new_empty(0 if call.before is None else call.before.shape)
    return losses, torch.empty_like(losses), slopes, stats, after


@dispatch.fake(FORWARD, "triton")
def _(*fields):
    losses, correct, slopes, stats, after = _fake_forward(*fields)
    slopes, stats = losses.new_empty(slopes.shape), losses.new_empty((stats.shape[0], 3))
    return losses, correct, slopes, stats, after


@dispatch.fake(BACKWARD)
def _(*fields):
    call = SupConLossBackwardCall(*fields)
    features = call.features
    dtype = accumulate_dtype(features) if call.unrounded else features.dtype
    return features.new_empty(features.shape, dtype=dtype)


class SupConLoss(similarity.SimilarityLoss):
    """`sup_con_loss` as a module. Its arguments are the options of the function."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or `(loss, correct)`; arguments as `apt_kernels.sup_con_loss`."""
        return sup_con_loss(features, labels, **self.arguments)
