"""The supervised contrastive loss: several positives a row, without the matrix of similarities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from . import similarity
from .ring.ring import no_classes, ring_of

FORWARD, BACKWARD = "sup_con_loss_fwd", "sup_con_loss_bwd"
dispatch.define(
    "sup_con_loss_fwd(Tensor features, Tensor labels, Tensor? classes, Tensor? class_labels, "
    "Tensor? temperatures, float temperature, bool normalize, SymInt self_offset, "
    "bool need_slopes, Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "sup_con_loss_bwd(Tensor grad_losses, Tensor? grad_class_losses, Tensor features, "
    "Tensor labels, Tensor? classes, Tensor? class_labels, Tensor? temperatures, "
    "float temperature, bool normalize, SymInt self_offset, Tensor stats, "
    "Tensor? class_stats, bool unrounded=False) -> Tensor"
)
dispatch.register("sup_con_loss", FORWARD, BACKWARD)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """-1/|P_i| sum_(p in P_i) log(exp(s_ip) / sum_(a != i) exp(s_ia)), and the accuracy.

    P_i are the other rows of anchor i's label. Two views of every sample with labels of their own
    give NT-Xent. The matrix of similarities is symmetric and exists a tile at a time: each pair of
    rows is multiplied once forward and once backward; memory is O(N D). Source: Khosla 2020,
    L_out; the authors' code multiplies it by temperature / 0.07, we do not.

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
            ranks, DistributedDataParallel's of gradients too, are those of one process with the
            whole batch. Rows travel around the ranks and every rank holds its own and two blocks of
            them: memory does not grow with the ranks. Every rank must run backward.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, accuracy)`, float32 (float64 for float64 features). accuracy, 0-dim, without a
        graph, is the share of the anchors with a positive (of this rank) whose best positive is
        strictly above every negative; 0 without such anchors.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("features", features)
    checks.tensor("labels", labels, checks.INTEGERS)
    checks.shape("labels", labels, features.shape[:1], "one label a row")
    checks.same_device("labels", labels, "features", features)
    similarity.check_options(temperature, reduction, process_group, "features", features)
    checks.flag("normalize", normalize)
    backend = dispatch.choose("sup_con_loss", features.device, backend, features.dtype)
    if backend == "reference":
        return reference.sup_con_loss(
            features,
            labels,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
        )
    ranks = ring_of(process_group, features.shape[0], features.device)
    losses, right, anchor = _SupConLoss.apply(
        features, labels.long().contiguous(), *similarity.scalar(temperature), bool(normalize),
        similarity.differentiable(temperature), backend, ranks,
    )  # fmt: skip
    anchors = total = anchor.sum()
    world = 1
    if ranks is not None:
        total, world = ranks.sum(anchors), ranks.world
    loss = similarity.reduced(losses, reduction, total, world)
    return loss, right.sum() / anchors.clamp(min=1)


class SupConLoss(nn.Module):
    """`sup_con_loss` as a module; its arguments are the options of the function."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        similarity.check_module(temperature, reduction, process_group, normalize=normalize)
        self.temperature, self.normalize, self.reduction = temperature, normalize, reduction
        self.process_group, self.backend = process_group, backend

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy)."""
        return sup_con_loss(
            features,
            labels,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _SupConLoss(torch.autograd.Function):
    """Over ranks, rows and labels travel, backward with their upstream gradients and statistics.

    The coefficient of a pair holds what it does to the losses of both of its rows, so that every
    rank makes the whole gradient of its own rows and no gradient travels.
    """

    @staticmethod
    def forward(ctx, features, labels, temperature, number, normalize, need_slopes, backend, ranks):
        state = None if ranks is None else no_classes(features, 7, lowest=(0, 3, 4))
        for step, (classes, class_labels) in enumerate(_blocks(ranks, features, labels)):
            losses, right, slopes, stats, state = dispatch.kernel(FORWARD, backend)(
                features, labels, *_classes(step, classes, class_labels), temperature, number,
                normalize, _itself(step, classes), need_slopes, state,
            )  # fmt: skip
        ctx.save_for_backward(features, labels, temperature, slopes, stats)
        ctx.options = (number, normalize, backend, ranks)
        anchor = stats[:, 1] > 0
        ctx.mark_non_differentiable(right, anchor)
        return losses, right, anchor

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, *_):
        features, labels, temperature, slopes, stats = ctx.saved_tensors
        number, normalize, backend, ranks = ctx.options
        grad_features = grad_temperature = None
        if ctx.needs_input_grad[0]:
            rows = grad_losses.contiguous()
            blocks = _blocks(ranks, features, labels, rows, stats)
            for step, (classes, class_labels, columns, class_stats) in enumerate(blocks):
                grad = dispatch.kernel(BACKWARD, backend)(
                    rows, columns if step else None, features, labels,
                    *_classes(step, classes, class_labels), temperature, number, normalize,
                    _itself(step, classes), stats, class_stats if step else None,
                    ranks is not None,
                )  # fmt: skip
                grad_features = grad if step == 0 else grad_features.add_(grad)
            grad_features = grad_features.to(features.dtype)
        if ctx.needs_input_grad[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        return grad_features, None, grad_temperature, None, None, None, None, None


def _blocks(ranks, *tensors):
    return [tensors] if ranks is None else ranks.blocks(*tensors)


def _classes(step, classes, class_labels):
    """Of the rows of this rank itself, each pair is multiplied once."""
    return (classes, class_labels) if step else (None, None)


def _itself(step, classes):
    """From a row to itself; beyond the classes that it is none of."""
    return len(classes) if step else 0


@dispatch.fake(FORWARD, "native")
def _fake_forward(
    features, labels, classes, class_labels, temperature, number, normalize, self_offset,
    need_slopes, before=None,
):  # fmt: skip
    rows = features.shape[0]
    losses = features.new_empty(rows, dtype=accumulate_dtype(features))
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    after = stats.new_empty(0 if before is None else before.shape)
    return losses, torch.empty_like(losses), slopes, stats, after


@dispatch.fake(FORWARD, "triton")
def _(*arguments):
    losses, correct, slopes, stats, after = _fake_forward(*arguments)
    slopes, stats = losses.new_empty(slopes.shape), losses.new_empty((stats.shape[0], 3))
    return losses, correct, slopes, stats, after


@dispatch.fake(BACKWARD)
def _(
    grad_losses, grad_class_losses, features, labels, classes, class_labels, temperature, number,
    normalize, self_offset, stats, class_stats, unrounded=False,
):  # fmt: skip
    return features.new_empty(
        features.shape, dtype=accumulate_dtype(features) if unrounded else features.dtype
    )
