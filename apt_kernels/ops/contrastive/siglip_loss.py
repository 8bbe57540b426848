"""SigLIP's sigmoid loss of all pairs of queries and keys, without their matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once
from . import similarity
from .ring.ring import gradients, no_classes, ring_of

FORWARD, BACKWARD = "siglip_loss_fwd", "siglip_loss_bwd"
dispatch.define(
    "siglip_loss_fwd(Tensor query, Tensor key, Tensor? temperatures, float temperature, "
    "Tensor? biases, float logit_bias, bool normalize, SymInt label_offset, "
    "bool need_slopes, Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "siglip_loss_bwd(Tensor? grad_losses, Tensor? grad_column_losses, Tensor query, "
    "Tensor key, Tensor? temperatures, float temperature, Tensor? biases, float logit_bias, "
    "bool normalize, SymInt label_offset, bool need_query, bool need_key, "
    "bool unrounded=False) -> (Tensor, Tensor)"
)
dispatch.register("siglip_loss", FORWARD, BACKWARD)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_j -log sigmoid(z_ij (q_i . k_j / temperature + logit_bias)) of rows, and the accuracy.

    z is 1 for a row's own key and -1 for others. The matrix of similarities exists a tile at a
    time: memory is O((N + M) D), forward costs one product of all pairs, backward three. Source:
    Zhai 2023 (SigLIP), eq. 1.

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
            number of ranks: averages over ranks, DistributedDataParallel's of gradients too, are
            those of one process with the whole batch. Keys travel around the ranks and every rank
            holds its own and two blocks of them: memory does not grow with the ranks. Every rank
            must run backward.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, accuracy)`, float32 (float64 for float64 rows). accuracy, 0-dim, without a graph, is
        the share of rows (of this rank) whose key is strictly above every other; 0 for no rows.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    similarity.check_rows("query", query)
    similarity.check_like("key", key, "query", query)
    similarity.check_options(temperature, reduction, process_group, "query", query)
    checks.flag("normalize", normalize)
    if isinstance(logit_bias, Tensor):
        similarity.check_scalar("logit_bias", logit_bias, "query", query)
    else:
        checks.finite("logit_bias", logit_bias)
    similarity.check_label_offset(label_offset, query, key, process_group)
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
        )
    ranks = ring_of(process_group, query.shape[0], query.device)
    need_slopes = similarity.differentiable(temperature) or similarity.differentiable(logit_bias)
    losses, right = _SigLIPLoss.apply(
        query, key, *similarity.scalar(temperature), *similarity.scalar(logit_bias),
        bool(normalize), label_offset, need_slopes, backend, ranks,
    )  # fmt: skip
    total, world = (query.shape[0], 1) if ranks is None else (ranks.total, ranks.world)
    return similarity.reduced(losses, reduction, total, world), similarity.share(right)


class SigLIPLoss(nn.Module):
    """`siglip_loss` as a module; its arguments are the options of the function.

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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        similarity.check_module(temperature, reduction, process_group, normalize=normalize)
        if not isinstance(logit_bias, Tensor):
            checks.finite("logit_bias", logit_bias)
        self.temperature, self.logit_bias, self.normalize = temperature, logit_bias, normalize
        self.reduction, self.process_group, self.backend = reduction, process_group, backend

    def forward(self, query: Tensor, key: Tensor, label_offset: int = 0) -> tuple[Tensor, Tensor]:
        """(loss, accuracy)."""
        return siglip_loss(
            query,
            key,
            temperature=self.temperature,
            logit_bias=self.logit_bias,
            normalize=self.normalize,
            label_offset=label_offset,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, logit_bias={self.logit_bias}"


class _SigLIPLoss(torch.autograd.Function):
    """Over ranks, the keys travel: see `ring.gradients`. The losses of a row are sums over keys."""

    @staticmethod
    def forward(
        ctx, query, key, temperature, number, bias, bias_number, normalize, label_offset,
        need_slopes, backend, ranks,
    ):  # fmt: skip
        state = None if ranks is None else no_classes(query, 5)
        blocks = [(key,)] if ranks is None else ranks.blocks(key)
        for step, (keys,) in enumerate(blocks):
            offset = label_offset if step == 0 else len(keys)  # beyond: no positives here
            losses, right, slopes, bias_slopes, state = dispatch.kernel(FORWARD, backend)(
                query, keys, temperature, number, bias, bias_number, normalize, offset,
                need_slopes, state,
            )  # fmt: skip
        ctx.save_for_backward(query, key, temperature, bias, slopes, bias_slopes)
        ctx.options = (number, bias_number, normalize, label_offset, backend, ranks)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_losses, _):
        query, key, temperature, bias, slopes, bias_slopes = ctx.saved_tensors
        number, bias_number, normalize, label_offset, backend, ranks = ctx.options
        needs, rows = ctx.needs_input_grad, grad_losses.contiguous()

        def part(step, keys, unrounded=True):
            return dispatch.kernel(BACKWARD, backend)(
                rows, None, query, keys, temperature, number, bias, bias_number, normalize,
                label_offset if step == 0 else len(keys), needs[0], needs[1], unrounded,
            )  # fmt: skip

        grad_query = grad_key = grad_temperature = grad_bias = None
        if needs[0] or needs[1]:
            if ranks is None:
                grad_query, grad_key = part(0, key, unrounded=False)
            else:
                grad_query, grad_key = gradients(ranks, part, key, need_sent=needs[1])
        if needs[2]:
            grad_temperature = similarity.grad_temperature(temperature, grad_losses, slopes)
        if needs[4]:
            grad_bias = (grad_losses * bias_slopes).sum().to(bias.dtype)
        return (
            grad_query.to(query.dtype) if needs[0] else None,
            grad_key.to(key.dtype) if needs[1] else None,
            grad_temperature, None, grad_bias, None, None, None, None, None, None,
        )  # fmt: skip


@dispatch.fake(FORWARD, "native")
def _fake_forward(
    query, key, temperature, number, bias, bias_number, normalize, label_offset, need_slopes,
    before=None,
):  # fmt: skip
    rows = query.shape[0]
    losses = query.new_empty(rows, dtype=accumulate_dtype(query))
    slopes = losses.new_empty(rows if need_slopes else 0, dtype=torch.float64)
    after = slopes.new_empty(0 if before is None else before.shape)
    return losses, torch.empty_like(losses), slopes, torch.empty_like(slopes), after


@dispatch.fake(FORWARD, "triton")
def _(*arguments):
    losses, correct, *slopes, after = _fake_forward(*arguments)
    return losses, correct, *(losses.new_empty(s.shape) for s in slopes), after


@dispatch.fake(BACKWARD)
def _(
    grad_losses, grad_column_losses, query, key, temperature, number, bias, bias_number, normalize,
    label_offset, need_query, need_key, unrounded=False,
):  # fmt: skip
    dtype = accumulate_dtype(query) if unrounded else query.dtype
    grad_query = query.new_empty(query.shape if need_query else 0, dtype=dtype)
    return grad_query, key.new_empty(key.shape if need_key else 0, dtype=dtype)
