"""NT-Xent, SimCLR's loss over two views of every sample, by half of their similarities."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ... import checks, dispatch, reference
from ..common.autocast import as_autocast
from ..common.autograd import differentiable_once, gradients
from . import similarity
from .calls import INFO_NCE, NT_XENT, NTXentBackwardCall, NTXentCall
from .ring.nt_xent import NTXentRing
from .ring.ring import ring_of

dispatch.register("nt_xent", *NT_XENT, *INFO_NCE)  # INFO_NCE: over a ring of processes


@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = ...,
    normalize: bool = ...,
    reduction: str = ...,
    process_group: dist.ProcessGroup | None = ...,
    return_correct: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross-entropy of each view's other view among all views but itself.

    The mean is over 2N rows, as in lightly and solo-learn; google-research's simclr gives twice as
    much. The matrix of similarities is symmetric and exists a tile at a time: each pair of rows is
    multiplied once forward and once backward, with one coefficient for both; memory is O(N D).
    Under autocast all rows are cast to its dtype, as a product of matrices does; sums are float32.
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
            averages over ranks, DistributedDataParallel's of gradients too, equal the ones of one
            process with the whole batch. Views travel half way around the ranks, so that each pair
            is multiplied once there too; a rank holds its own and two blocks of them: memory does
            not grow with the ranks. Every rank must run backward.
        return_correct: also return how many predictions are right.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, float32 (float64 for float64 views). With `return_correct` the pair
        `(loss, correct)`: correct, a 0-dim int64 tensor, is the number of the 2N rows (of this
        rank) whose other view is strictly above every other class. One sample alone: loss 0,
        correct 2.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("z1", z1)
    similarity.check_like("z2", z2, "z1", z1)
    checks.shape("z2", z2, z1.shape, "that of z1")
    similarity.check_options(temperature, reduction, process_group, "z1", z1)
    checks.flag("normalize", normalize)
    checks.flag("return_correct", return_correct)
    z1, z2 = as_autocast(z1, z2)
    backend = dispatch.choose("nt_xent", z1.device, backend, z1.dtype)
    if backend == "reference":
        return reference.nt_xent(
            z1,
            z2,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
        )
    ranks = ring_of(process_group, 2 * z1.shape[0], z1.device)
    temperature_tensor, number = similarity.scalar(temperature)
    call = NTXentCall(
        z1=z1,
        z2=z2,
        temperature_tensor=temperature_tensor,
        temperature=number,
        normalize=normalize,
        need_slopes=similarity.differentiable(temperature),
    )
    if ranks is None:
        losses, correct = _NTXent.apply(*call, backend)
    else:
        losses, correct = NTXentRing.apply(*call, backend, ranks)
    return similarity.results(
        losses, correct, reduction=reduction, ranks=ranks, return_correct=return_correct
    )


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = NTXentCall(*fields)
        losses, correct, slopes, stats, _ = dispatch.kernel(NT_XENT[0], backend)(*call)
        ctx.save_for_backward(call.z1, call.z2, call.temperature_tensor, slopes, stats)
        ctx.temperature, ctx.normalize, ctx.backend = call.temperature, call.normalize, backend
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        z1, z2, temperature_tensor, slopes, stats = ctx.saved_tensors
        needs = NTXentCall(*ctx.needs_input_grad[:-1])
        grads = {}
        if needs.z1 or needs.z2:
            call = NTXentBackwardCall(
                grad_losses=grad_losses.contiguous(),
                z1=z1,
                z2=z2,
                temperature_tensor=temperature_tensor,
                temperature=ctx.temperature,
                normalize=ctx.normalize,
                stats=stats,
            )
            grad = dispatch.kernel(NT_XENT[1], ctx.backend)(*call)
            grads["z1"] = grad[: z1.shape[0]] if needs.z1 else None
            grads["z2"] = grad[z1.shape[0] :] if needs.z2 else None
        if needs.temperature_tensor:
            grads["temperature_tensor"] = similarity.grad_temperature(
                temperature_tensor, grad_losses, slopes
            )
        return gradients(NTXentCall, **grads)


class NTXentLoss(similarity.SimilarityLoss):
    """`nt_xent` as a module. Its arguments are the options of the function."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or `(loss, correct)`; arguments as `apt_kernels.nt_xent`."""
        return nt_xent(z1, z2, **self.arguments)
