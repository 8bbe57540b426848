"""Cross-entropy of an output head, with its gradient formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.logprobs import head_logits
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from ..common.head import (
    check_head,
    fake_gradients,
    head_logprobs,
    kernel_layout,
    needs_gradient,
    scaled_gradients,
)
from ..common.token_inputs import normalizer_tensor

KERNEL = "linear_cross_entropy_fwd"
MEAN, SUM = 1, 2  # the argument `reduction` of the kernel
dispatch.define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? normalizer, int ignore_index, float label_smoothing, float softcap, "
    "float logit_scale, int reduction, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("linear_cross_entropy", KERNEL)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """-(1-s) log p[label] - s/V sum_v log p[v] over the rows that count, and how many are right.

    p = softmax(softcap * tanh(x / softcap)), x = logit_scale * (hidden @ weight^T + bias). Ignored
    rows are dropped before the product. The gradients are formed in the forward pass and backward
    only scales them: 6 M D V flops for M rows that count, 8 M D V for 16-bit inputs on the CPU. Of
    float16 inputs backward forms them, of the scaled loss: 2 M D V flops more.
    Workspace there: an eighth of the logits of those rows, within 7 and 64 MiB. Sources:
    Szegedy 2016 (label smoothing); Wijmans 2024, "Cut your losses in large-vocabulary language
    models".

    Args:
        hidden: `(..., D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        weight: `(V, D)`, the output embedding, differentiable. Of other dtypes than `hidden`
            the widest is taken for all.
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
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, correct)`: the loss, 0-dim or `(...)`, float32 (float64 for float64 inputs), 0 with
        a graph where no row counts; and a 0-dim int64 tensor, the rows that count whose largest
        logit (the first of equals) is their label.

    Raises:
        ValueError, TypeError: a wrong argument. A label outside [0, V) that is not `ignore_index`
            is a ValueError on the CPU; on a GPU it makes the loss NaN.
    """
    _check(hidden, weight, labels, bias, softcap, logit_scale, normalizer)
    _check_options(ignore_index, label_smoothing, reduction)
    if reduction != "mean":
        checks.unused("normalizer", normalizer, "only the mean is divided")
    backend = dispatch.choose("linear_cross_entropy", hidden.device, backend, hidden.dtype)
    per_row = reduction == "none"
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
        )
    head = kernel_layout(hidden, weight, bias)
    loss, correct = _LinearCrossEntropy.apply(
        *head,
        labels.long().reshape(-1).contiguous(),
        normalizer_tensor(normalizer, head[0]),
        ignore_index,
        float(label_smoothing),
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        MEAN if reduction == "mean" else SUM,
        *(needs_gradient(t) and not per_row for t in head),
        backend,
    )
    if per_row:
        options = (ignore_index, label_smoothing, softcap, logit_scale, backend)
        loss = _row_losses(hidden, weight, labels, bias, *options)
    return loss, correct


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


def _row_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """-log p[label] + s (z[label] - mean z); the mean of the logits is a product with a mean."""
    counts = labels != ignore_index
    logps, _ = head_logprobs(
        hidden, weight, bias, labels, counts, 1.0, softcap, logit_scale, False, backend
    )
    if not label_smoothing:
        return -logps
    ids = labels.long().masked_fill(~counts, 0)
    if softcap is None:
        dtype = logps.dtype
        rows = torch.where(counts.unsqueeze(-1), hidden, torch.zeros_like(hidden)).to(dtype)
        excess = ((weight[ids].to(dtype) - weight.mean(0, dtype=dtype)) * rows).sum(-1)
        if bias is not None:
            excess = excess + (bias[ids].to(dtype) - bias.mean(dtype=dtype))
        excess = logit_scale * excess
    else:
        x = head_logits(hidden, weight, bias, logit_scale, counts)
        z = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
        excess = z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - z.mean(-1)
    return torch.where(counts, label_smoothing * excess - logps, torch.zeros_like(logps))


def _check_options(ignore_index: Any, label_smoothing: Any, reduction: Any) -> None:
    checks.integer("ignore_index", ignore_index)
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module: what stays the same is given once."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_options(ignore_index, label_smoothing, reduction)
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, normalizer=normalizer, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, backend = arguments
        needed = tuple(inputs[-3:])
        wait = inputs[0].dtype == torch.float16 and any(needed)
        loss, correct, *grads = dispatch.kernel(KERNEL, backend)(
            *inputs[:-3], *((False,) * 3 if wait else needed)
        )
        ctx.needed, ctx.wait, ctx.backend = needed, wait, backend
        ctx.options = inputs[5:-3]
        ctx.save_for_backward(*(inputs[:5] if wait else grads))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, _):
        if ctx.wait:
            grads = _gradients_of(
                grad_loss, ctx.saved_tensors, ctx.options, ctx.needed, ctx.backend
            )
        else:
            grads = scaled_gradients(ctx.saved_tensors, ctx.needed, grad_loss)
        return *grads, *(None,) * 11


def _gradients_of(
    upstream: Tensor,
    inputs: tuple[Tensor | None, ...],
    options: list,
    needed: tuple[bool, ...],
    backend: str,
) -> list[Tensor | None]:
    """Those of upstream * loss, which is the loss of another normalizer."""
    *head, labels, normalizer = inputs
    ignore_index, *scales, reduction = options
    if reduction == SUM:
        normalizer = torch.ones_like(upstream)
    elif normalizer is None:
        normalizer = (labels != ignore_index).sum().clamp(min=1).to(upstream.dtype)
    _, _, *grads = dispatch.kernel(KERNEL, backend)(
        *head, labels, normalizer / upstream, ignore_index, *scales, MEAN, *needed
    )
    return [g if n else None for g, n in zip(grads, needed, strict=True)]


@dispatch.fake(KERNEL)
def _(hidden, weight, bias, labels, normalizer, *options):
    loss = hidden.new_empty((), dtype=accumulate_dtype(hidden))
    correct = torch.empty((), dtype=torch.int64, device=hidden.device)
    return loss, correct, *fake_gradients(hidden, weight, options[-3:])
