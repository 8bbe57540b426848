"""The supervised contrastive loss: several positives a row, without the matrix of similarities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import checks, dispatch, reference
from ..reference.numerics import accumulate_dtype
from . import similarity

FORWARD, BACKWARD = "sup_con_loss_fwd", "sup_con_loss_bwd"
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
            whole batch. Every rank must run backward.
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
    backend = dispatch.choose("sup_con_loss", features.device, backend)
    if backend == "reference":
        return reference.sup_con_loss(
            features,
            labels,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
        )
    ranks = similarity.ranks_of(process_group, features)
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
    """Over ranks, rows of this rank against those of all; see `nt_xent` for what is exchanged."""

    @staticmethod
    def forward(ctx, features, labels, temperature, number, normalize, need_slopes, backend, ranks):
        classes = class_labels = None
        start = 0
        if ranks is not None:
            classes, class_labels = ranks.gather(features), ranks.gather(labels)
            start = ranks.start
        losses, right, slopes, stats = dispatch.kernel(FORWARD, backend)(
            features, labels, classes, class_labels, temperature, number, normalize, start,
            need_slopes,
        )  # fmt: skip
        ctx.save_for_backward(features, labels, classes, class_labels, temperature, slopes, stats)
        ctx.options = (number, normalize, start, backend, ranks)
        anchor = stats[:, 1] > 0
        ctx.mark_non_differentiable(right, anchor)
        return losses, right, anchor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        features, labels, classes, class_labels, temperature, slopes, stats = ctx.saved_tensors
        number, normalize, start, backend, ranks = ctx.options
        rows, columns, class_stats = grad_losses.contiguous(), None, None
        grad_features = grad_temperature = None
        if ctx.needs_input_grad[0]:
            if ranks is not None:
                columns, class_stats = ranks.gather(rows), ranks.gather(stats)
            grad_features = dispatch.kernel(BACKWARD, backend)(
                rows, columns, features, labels, classes, class_labels, temperature, number,
                normalize, start, stats, class_stats,
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        return grad_features, None, grad_temperature, None, None, None, None, None


@dispatch.fake(FORWARD)
def _(
    features, labels, classes, class_labels, temperature, number, normalize, self_offset,
    need_slopes,
):  # fmt: skip
    rows = features.shape[0]
    losses = features.new_empty(rows, dtype=accumulate_dtype(features))
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    return losses, torch.empty_like(losses), slopes, stats


@dispatch.fake(BACKWARD)
def _(grad_losses, grad_class_losses, features, *arguments):
    return features.new_empty(features.shape)
