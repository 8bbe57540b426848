"""Contrastive losses: InfoNCE, NT-Xent, SigLIP, SupCon."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .numerics import accumulate_dtype, keep

SMALLEST_SQUARED_NORM = 1e-24  # below it a row has no direction: it is taken as zero


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the cross-entropy of each query's own key among the keys.

    s = q . k / temperature of unit vectors; the loss of row i is logsumexp_j s_ij - s_i,i+offset.
    Sources: van den Oord 2018; Radford 2021 (CLIP: symmetric); He 2020 (MoCo: negatives).

    Arguments and results as `apt_kernels.info_nce`.
    """
    scale = 1 / _temperature(temperature, query)
    q, k = _unit_rows(query, normalize), _unit_rows(key, normalize)
    start, total, world = _place(len(q), process_group, q.device)
    if negatives is not None:
        own = (q * k).sum(-1, keepdim=True)
        others = q @ _unit_rows(negatives, normalize).to(q.dtype).mT
        logits = torch.cat([own, others], dim=-1) * scale
        positive = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        losses, correct = _rows(logits, positive)
    else:
        positive = torch.arange(len(q), device=q.device) + start + label_offset
        losses, correct = _rows(q @ _gathered(k, process_group).mT * scale, positive)
        if symmetric:
            columns, column_correct = _rows(k @ _gathered(q, process_group).mT * scale, positive)
            losses, correct = 0.5 * (losses + columns), 0.5 * (correct + column_correct)
    loss = _reduced(losses, reduction, total, world)
    return (loss, _count(correct, 2 if symmetric else 1)) if return_correct else loss


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns SimCLR's loss over the 2N views.

    The classes of a view are all others, never itself; its positive is the other view of its
    sample. The mean is over 2N rows (lightly, solo-learn; google-research's simclr gives twice as
    much). Source: Chen 2020, eq. 1.

    Arguments and results as `apt_kernels.nt_xent`.
    """
    scale = 1 / _temperature(temperature, z1)
    u1, u2 = _unit_rows(z1, normalize), _unit_rows(z2, normalize)
    start, total, world = _place(len(u1), process_group, u1.device)
    classes = torch.cat([_gathered(u1, process_group), _gathered(u2, process_group)])
    first = torch.arange(len(u1), device=u1.device) + start
    own, positive = torch.cat([first, first + total]), torch.cat([first + total, first])
    logits = torch.cat([u1, u2]) @ classes.mT * scale
    itself = own.unsqueeze(-1) == torch.arange(len(classes), device=own.device)
    losses, correct = _rows(logits.masked_fill(itself, -torch.inf), positive)
    loss = _reduced(losses, reduction, 2 * total, world)
    return (loss, _count(correct)) if return_correct else loss


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the sigmoid loss of all pairs.

    Row i costs sum_j -log sigmoid(z_ij (q_i . k_j / temperature + logit_bias)), z = 1 for its own
    key and -1 for others; the mean is over rows. Source: Zhai 2023 (SigLIP), eq. 1.

    Arguments and results as `apt_kernels.siglip_loss`.
    """
    q, k = _unit_rows(query, normalize), _unit_rows(key, normalize)
    start, total, world = _place(len(q), process_group, q.device)
    logits = q @ _gathered(k, process_group).mT / _temperature(temperature, query)
    bias = logit_bias.to(q.dtype) if isinstance(logit_bias, Tensor) else logit_bias
    positive = torch.arange(len(q), device=q.device) + start + label_offset
    own = positive.unsqueeze(-1) == torch.arange(logits.shape[-1], device=q.device)
    pairs = logits + bias
    losses = -F.logsigmoid(torch.where(own, pairs, -pairs)).sum(-1)
    loss = _reduced(losses, reduction, total, world)
    return (loss, _count(_rows(logits.detach(), positive)[1])) if return_correct else loss


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the supervised contrastive loss.

    Anchor i with the others of its label P_i costs
    -1/|P_i| sum_(p in P_i) log(exp(s_ip) / sum_(a != i) exp(s_ia)). Source: Khosla 2020, L_out;
    the authors' code multiplies it by temperature / 0.07, we do not.

    Arguments and results as `apt_kernels.sup_con_loss`.
    """
    u = _unit_rows(features, normalize)
    start, _, world = _place(len(u), process_group, u.device)
    classes = _gathered(u, process_group)
    class_labels = _gathered(labels, process_group)
    own = torch.arange(len(u), device=u.device) + start
    itself = own.unsqueeze(-1) == torch.arange(len(classes), device=u.device)
    positive = (labels.unsqueeze(-1) == class_labels) & ~itself
    logits = u @ classes.mT / _temperature(temperature, features)
    log_probs = torch.log_softmax(logits.masked_fill(itself, -torch.inf), dim=-1)
    count = positive.sum(-1)
    anchor = count > 0
    losses = -keep(positive, log_probs).sum(-1) / count.clamp(min=1)
    best = logits.detach().masked_fill(~positive, -torch.inf)
    worst = logits.detach().masked_fill(positive | itself, -torch.inf)
    correct = anchor
    if len(classes):
        correct = anchor & (best.amax(-1) > worst.amax(-1))
    anchors = _total(anchor.sum(), process_group).clamp(min=1)
    loss = _reduced(losses, reduction, anchors, world)
    return (loss, _count(correct)) if return_correct else loss


def _temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return temperature.to(accumulate_dtype(like))
    return temperature


def _unit_rows(x: Tensor, normalize: bool) -> Tensor:
    x = x.to(accumulate_dtype(x))
    if not normalize:
        return x
    squared = x.square().sum(-1, keepdim=True)
    has_direction = ~(squared <= SMALLEST_SQUARED_NORM)
    inverse = torch.rsqrt(torch.where(has_direction, squared, torch.ones_like(squared)))
    unit = x * keep(squared.isfinite(), inverse, torch.nan)
    return keep(has_direction, unit)


def _rows(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and 1 where its positive is strictly above all others."""
    if logits.numel() == 0:
        return logits.sum(-1), logits.detach().sum(-1)
    positive = positive.unsqueeze(-1)
    own = logits.detach().gather(-1, positive)
    others = logits.detach().scatter(-1, positive, -torch.inf).amax(-1)
    losses = -torch.log_softmax(logits, dim=-1).gather(-1, positive).squeeze(-1)
    return losses, (own.squeeze(-1) > others).to(logits.dtype)


def _reduced(losses: Tensor, reduction: str, total: int | Tensor, world: int) -> Tensor:
    """The losses of this rank, reduced; "mean" so that the mean over ranks is over all rows."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
    return losses.sum() * world / total


def _count(correct: Tensor, directions: int = 1) -> Tensor:
    """The number of right predictions from their share in each row."""
    return (correct * directions).sum(dtype=torch.int64)


def _sizes(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor(count, device=device), group=group)
    return [int(size) for size in sizes]


def _place(
    count: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[int, int, int]:
    """The first row of this rank, the rows of all ranks and the number of ranks."""
    if group is None:
        return 0, count, 1
    sizes = _sizes(count, group, device)
    return sum(sizes[: group.rank()]), sum(sizes), group.size()


def _total(count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def _gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks in rank order; their gradient is the sum of what each rank gives."""
    return rows if group is None else _GatheredRows.apply(rows, group)


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        sizes = _sizes(len(rows), group, rows.device)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        ctx.group, ctx.start, ctx.count = group, sum(sizes[: group.rank()]), len(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.start : ctx.start + ctx.count], None
