"""NT-Xent, SimCLR's loss over two views of every sample, by half of their similarities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from . import similarity
from .ring.nt_xent import RECTANGLE, NTXentRing
from .ring.ring import ring_of

FORWARD, BACKWARD = "nt_xent_fwd", "nt_xent_bwd"
dispatch.define(
    "nt_xent_fwd(Tensor z1, Tensor z2, Tensor? temperatures, float temperature, "
    "bool normalize, bool need_slopes, "
    "Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "nt_xent_bwd(Tensor grad_losses, Tensor z1, Tensor z2, Tensor? temperatures, "
    "float temperature, bool normalize, Tensor stats, bool unrounded=False) -> Tensor"
)
dispatch.register("nt_xent", FORWARD, BACKWARD, *RECTANGLE)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each view's other view among all views but itself, and the accuracy.

    The mean is over 2N rows (as lightly's and solo-learn's; google-research's simclr gives twice as
    much). The matrix of similarities is symmetric and exists a tile at a time: each pair of rows is
    multiplied once forward and once backward, with one coefficient for both; memory is O(N D).
    Source: Chen 2020 (SimCLR), eq. 1.

    Args:
        z1: `(N, D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        z2: `(N, D)` in the dtype of z1; any strides; differentiable.
        temperature: a finite number above 0, or a 0-dim tensor of one, differentiable. In a tensor,
            a wrong number is an error on the CPU; on a GPU the loss is not a number.
        normalize: bring all rows to unit length; a row of length under 1e-12 counts as zero and has
            zero gradient.
        reduction: "mean" over the 2N rows (0 for none), "sum" or "none": `(2N,)`, z1's rows first.
        process_group: every rank brings its own views, as many samples as it likes, and the views
            of all are the classes. Its loss is its part of the whole times the number of ranks:
            averages over ranks, DistributedDataParallel's of gradients too, are those of one
            process with the whole batch. Views travel half way around the ranks, so that each pair
            is multiplied once there too; a rank holds its own and two blocks of them: memory does
            not grow with the ranks. Every rank must run backward.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, accuracy)`, float32 (float64 for float64 views). accuracy, 0-dim, without a graph,
        is the share of rows (of this rank) whose other view is strictly above every other class.
        One sample alone: loss 0, accuracy 1.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("z1", z1)
    similarity.check_like("z2", z2, "z1", z1)
    checks.shape("z2", z2, z1.shape, "that of z1")
    similarity.check_options(temperature, reduction, process_group, "z1", z1)
    checks.flag("normalize", normalize)
    backend = dispatch.choose("nt_xent", z1.device, backend, z1.dtype)
    if backend == "reference":
        return reference.nt_xent(
            z1,
            z2,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
        )
    ranks = ring_of(process_group, 2 * z1.shape[0], z1.device)
    options = (*similarity.scalar(temperature), bool(normalize))
    need_slopes = similarity.differentiable(temperature)
    if ranks is None:
        losses, right = _NTXent.apply(z1, z2, *options, need_slopes, backend)
    else:
        losses, right = NTXentRing.apply(z1, z2, *options, need_slopes, backend, ranks)
    total, world = (2 * z1.shape[0], 1) if ranks is None else (ranks.total, ranks.world)
    return similarity.reduced(losses, reduction, total, world), similarity.share(right)


class NTXentLoss(nn.Module):
    """`nt_xent` as a module; its arguments are the options of the function."""

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

    def forward(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy)."""
        return nt_xent(
            z1,
            z2,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z1, z2, temperature, number, normalize, need_slopes, backend):
        losses, right, slopes, stats, _ = dispatch.kernel(FORWARD, backend)(
            z1, z2, temperature, number, normalize, need_slopes
        )
        ctx.save_for_backward(z1, z2, temperature, slopes, stats)
        ctx.options = (number, normalize, backend)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        z1, z2, temperature, slopes, stats = ctx.saved_tensors
        number, normalize, backend = ctx.options
        needs = ctx.needs_input_grad
        grad_z1 = grad_z2 = grad_temperature = None
        if needs[0] or needs[1]:
            grad = dispatch.kernel(BACKWARD, backend)(
                grad_losses.contiguous(), z1, z2, temperature, number, normalize, stats
            )
            grad_z1, grad_z2 = grad[: z1.shape[0]], grad[z1.shape[0] :]
        if needs[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        return (
            grad_z1 if needs[0] else None, grad_z2 if needs[1] else None, grad_temperature,
            None, None, None, None,
        )  # fmt: skip


@dispatch.fake(FORWARD, "native")
def _fake_forward(z1, z2, temperature, number, normalize, need_slopes, before=None):
    rows = 2 * z1.shape[0]
    losses = z1.new_empty(rows, dtype=accumulate_dtype(z1))
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    after = stats.new_empty(0 if before is None else before.shape)
    return losses, torch.empty_like(losses), slopes, stats, after


@dispatch.fake(FORWARD, "triton")
def _(*arguments):
    losses, correct, slopes, stats, after = _fake_forward(*arguments)
    slopes, stats = losses.new_empty(slopes.shape), losses.new_empty((stats.shape[0], 4))
    return losses, correct, slopes, stats, after


@dispatch.fake(BACKWARD)
def _(grad_losses, z1, z2, temperature, number, normalize, stats, unrounded=False):
    dtype = accumulate_dtype(z1) if unrounded else z1.dtype
    return z1.new_empty((2 * z1.shape[0], z1.shape[1]), dtype=dtype)
