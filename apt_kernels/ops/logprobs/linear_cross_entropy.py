"""Cross-entropy of an output head, with its gradient formed in the forward pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import REDUCTIONS
from ...reference.head import head_logits
from ...reference.numerics import accumulate_dtype
from ..common.autocast import as_autocast
from ..common.autograd import differentiable_once, gradients
from ..common.head import (
    check_head,
    fake_gradients,
    head_logprobs,
    kernel_layout,
    needs_gradient,
    only_needed,
    scaled_gradients,
)
from ..common.module import LossModule
from ..common.token_inputs import normalizer_tensor

KERNEL = "linear_cross_entropy_fwd"
dispatch.define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? normalizer, int ignore_index, float label_smoothing, float softcap, "
    "float logit_scale, int reduction, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("linear_cross_entropy", KERNEL)


class LinearCrossEntropyCall(NamedTuple):
    """The arguments of the kernel: rows `(N, D)` of one dtype, and options as numbers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    normalizer: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float
    reduction: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    @property
    def needed(self) -> tuple[bool, bool, bool]:
        return self.need_hidden, self.need_weight, self.need_bias


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_correct: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross-entropy -(1-s) log p[label] - s/V sum_v log p[v] over the rows that count.

    p = softmax(softcap * tanh(x / softcap)), x = logit_scale * (hidden @ weight^T + bias). Ignored
    rows are dropped before the product. The gradients are formed in the forward pass and backward
    only scales them: 6 M D V flops for M rows that count, 8 M D V for 16-bit inputs on the CPU.
    For float16 inputs backward forms the gradients of the scaled loss: 2 M D V flops more.
    Workspace on the CPU: an eighth of the logits of those rows, within 7 and 64 MiB. Sources:
    Szegedy 2016 (label smoothing); Wijmans 2024, "Cut your losses in large-vocabulary language
    models".

    Args:
        hidden: `(..., D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        weight: `(V, D)`, the output embedding, differentiable. Where the dtypes of hidden states,
            weight and bias differ, all are converted to the widest. Under autocast they are
            converted to its dtype, as `F.linear` does; sums are float32 all the same.
        labels: `(...)` integers in [0, V), or `ignore_index`.
        bias: `(V,)` or None, differentiable.
        ignore_index: the label of rows that do not count, whatever they hold.
        label_smoothing: s, in [0, 1).
        reduction: "mean", "sum", or "none" for a loss a row (0 where ignored). "none" computes the
            logits twice forward and once backward, with label smoothing and a soft cap all whole.
        normalizer: what "mean" divides the sum by, a number above 0 or a 0-dim tensor (no
            gradient): the count of a batch that is split over steps or devices. None: the number
            of rows that count.
        softcap: bound of the tanh soft cap (Gemma 2), applied after `logit_scale`, or None.
        logit_scale: a factor of the logits, above 0 (Cohere, Granite).
        return_correct: also return how many predictions are right.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        The loss, 0-dim or `(...)`, float32 (float64 for float64 inputs); 0 with a graph where no
        row counts. With `return_correct` the pair `(loss, correct)`: correct is a 0-dim int64
        tensor, the number of rows that count whose largest logit (the first of equals) is their
        label.

    Raises:
        ValueError, TypeError: a wrong argument. A label outside [0, V) that is not `ignore_index`
            is a ValueError on the CPU; on a GPU it makes the loss NaN.
    """
    _check(hidden, weight, labels, bias, softcap, logit_scale, normalizer)
    _check_options(ignore_index, label_smoothing, reduction, return_correct)
    if reduction != "mean":
        checks.unused("normalizer", normalizer, "only the mean is divided")
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    backend = dispatch.choose("linear_cross_entropy", hidden.device, backend, hidden.dtype)
    if backend == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalizer=normalizer,
            softcap=softcap,
            logit_scale=logit_scale,
            return_correct=return_correct,
        )
    per_row = reduction == "none"
    rows, weight, bias = kernel_layout(hidden, weight, bias)
    call = LinearCrossEntropyCall(
        hidden=rows,
        weight=weight,
        bias=bias,
        labels=labels.long().reshape(-1).contiguous(),
        normalizer=normalizer_tensor(normalizer, rows),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        softcap=0.0 if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        reduction=REDUCTIONS["sum" if per_row else reduction],
        need_hidden=needs_gradient(rows) and not per_row,
        need_weight=needs_gradient(weight) and not per_row,
        need_bias=needs_gradient(bias) and not per_row,
    )
    loss, correct = _LinearCrossEntropy.apply(*call, backend)
    if per_row:
        loss = _row_losses(call, backend).reshape(labels.shape)
    return (loss, correct) if return_correct else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    normalizer: float | Tensor | None,
) -> None:
    rows = check_head(hidden, weight, bias, softcap, logit_scale)
    checks.tensor("labels", labels, checks.INTEGERS)
    checks.shape("labels", labels, rows, "one label a row of hidden")
    checks.same_device("labels", labels, "hidden", hidden)
    checks.normalizer(normalizer, "hidden", hidden)


def _check_options(
    ignore_index: Any, label_smoothing: Any, reduction: Any, return_correct: Any
) -> None:
    checks.integer("ignore_index", ignore_index)
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("return_correct", return_correct)


def _row_losses(call: LinearCrossEntropyCall, backend: str) -> Tensor:
    """-log p[label] + s (z[label] - mean z); the mean of the logits is a product with a mean."""
    counts = call.labels != call.ignore_index
    logps, _ = head_logprobs(
        call.hidden,
        call.weight,
        call.bias,
        call.labels,
        mask=counts,
        softcap=call.softcap or None,
        logit_scale=call.logit_scale,
        backend=backend,
    )
    if not call.label_smoothing:
        return -logps
    ids = call.labels.masked_fill(~counts, 0)
    if not call.softcap:
        # Converted before they are indexed: autograd adds the gradients of equal labels up in the
        # dtype of what is indexed, and sums of many rows need more than 16 bits.
        hidden, weight = call.hidden.to(logps.dtype), call.weight.to(logps.dtype)
        hidden = torch.where(counts.unsqueeze(-1), hidden, torch.zeros_like(hidden))
        excess = ((weight[ids] - weight.mean(0)) * hidden).sum(-1)
        if call.bias is not None:
            bias = call.bias.to(logps.dtype)
            excess = excess + (bias[ids] - bias.mean())
        excess = call.logit_scale * excess
    else:
        x = head_logits(call.hidden, call.weight, call.bias, call.logit_scale, counts)
        z = torch.where(x == -torch.inf, x, call.softcap * torch.tanh(x / call.softcap))
        excess = z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - z.mean(-1)
    return torch.where(counts, call.label_smoothing * excess - logps, torch.zeros_like(logps))


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; float16 gradients wait for the upstream scale."""

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = LinearCrossEntropyCall._make(fields)
        ctx.needed, ctx.backend = call.needed, backend
        ctx.wait = call.hidden.dtype == torch.float16 and any(call.needed)
        if ctx.wait:
            loss_alone = call._replace(need_hidden=False, need_weight=False, need_bias=False)
            loss, correct, *_ = dispatch.kernel(KERNEL, backend)(*loss_alone)
            ctx.save_for_backward(call.hidden, call.weight, call.bias, call.labels, call.normalizer)
            ctx.ignore_index, ctx.label_smoothing = call.ignore_index, call.label_smoothing
            ctx.softcap, ctx.logit_scale = call.softcap, call.logit_scale
            ctx.reduction = call.reduction
        else:
            loss, correct, *formed = dispatch.kernel(KERNEL, backend)(*call)
            ctx.save_for_backward(*formed)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        if ctx.wait:
            _, _, *formed = dispatch.kernel(KERNEL, ctx.backend)(*_call_of_scaled(ctx, grad_loss))
            grads = only_needed(formed, ctx.needed)
        else:
            grads = scaled_gradients(ctx.saved_tensors, ctx.needed, grad_loss)
        grad_hidden, grad_weight, grad_bias = grads
        return gradients(
            LinearCrossEntropyCall, hidden=grad_hidden, weight=grad_weight, bias=grad_bias
        )


def _call_of_scaled(ctx, grad_loss: Tensor) -> LinearCrossEntropyCall:
    """The call whose loss is grad_loss times the one of forward: a mean by another normalizer."""
    hidden, weight, bias, labels, normalizer = ctx.saved_tensors
    if ctx.reduction == REDUCTIONS["sum"]:
        normalizer = torch.ones_like(grad_loss)
    elif normalizer is None:
        normalizer = (labels != ctx.ignore_index).sum().clamp(min=1).to(grad_loss.dtype)
    need_hidden, need_weight, need_bias = ctx.needed
    return LinearCrossEntropyCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        normalizer=normalizer / grad_loss,
        ignore_index=ctx.ignore_index,
        label_smoothing=ctx.label_smoothing,
        softcap=ctx.softcap,
        logit_scale=ctx.logit_scale,
        reduction=REDUCTIONS["mean"],
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
    )


@dispatch.fake(KERNEL)
def _(*fields):
    call = LinearCrossEntropyCall(*fields)
    loss = call.hidden.new_empty((), dtype=accumulate_dtype(call.hidden))
    correct = torch.empty((), dtype=torch.int64, device=call.hidden.device)
    return loss, correct, *fake_gradients(call.hidden, call.weight, call.needed)


class LinearCrossEntropy(LossModule):
    """`linear_cross_entropy` as a module. Its arguments are the options of the function."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        return_correct: bool = False,
        backend: str | None = None,
    ) -> None:
        _check_options(ignore_index, label_smoothing, reduction, return_correct)
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
            logit_scale=logit_scale,
            return_correct=return_correct,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or `(loss, correct)`; arguments as `apt_kernels.linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, normalizer=normalizer, **self.options
        )
