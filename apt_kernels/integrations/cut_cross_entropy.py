"""cut-cross-entropy's loss under its own name. Nothing of cut-cross-entropy is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.logprobs.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    return_lse: bool = False,
    filter_eps: float | str | None = None,
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of `apt_kernels`. No gradient is left out for being small.

    Args:
        e: `(..., T, D)` hidden states, differentiable.
        c: `(V, D)`, the output embedding, differentiable.
        targets: `(..., T)` integers in [0, V), or `ignore_index`.
        bias: `(V,)`, differentiable.
        ignore_index: the target of positions that do not count.
        softcap: bound of the tanh soft cap, or None.
        reduction: "mean", "sum" or "none".
        shift: position t predicts the target at t + shift (True: 1), so that the last `shift`
            hidden states and the first `shift` targets are not used. In "none" the loss is then
            `(..., T - shift)`.
        return_lse: also return the logsumexp of the logits, differentiable, 0 where ignored; the
            logits are then computed once more in the backward pass.
        filter_eps: None, or a name or number that is not used: every gradient is formed.
        vocab_parallel_options: None. A head split over processes is refused.

    Returns:
        The loss, float32 (float64 for float64); with `return_lse` `(loss, lse)`, lse of the shape
        of the loss with reduction "none".
    """
    checks.choice("reduction", reduction, ("none", "sum", "mean"))
    checks.unused(
        "vocab_parallel_options", vocab_parallel_options, "the vocabulary must be whole here"
    )
    checks.tensor("e", e)
    checks.tensor("targets", targets, checks.INTEGERS)
    if int(shift):
        if int(shift) < 0 or targets.dim() == 0 or targets.shape[-1] <= int(shift):
            raise ValueError(
                f"shift: expected 0 to {targets.shape[-1] - 1 if targets.dim() else 0}, got {shift}"
            )
        e, targets = e[..., : -int(shift), :], targets[..., int(shift) :]
    if not return_lse:
        return _linear_cross_entropy(
            e,
            c,
            targets,
            reduction=reduction,
            bias=bias,
            ignore_index=ignore_index,
            softcap=softcap,
        )
    mask = targets != ignore_index
    ids = torch.where(mask, targets, 0)
    logps = linear_token_logprobs(e, c, ids, bias=bias, softcap=softcap, mask=mask)
    rows, heads = e[mask].to(logps.dtype), c.to(logps.dtype)[ids[mask]]  # sums in that dtype
    logits = (rows * heads).sum(-1)
    if bias is not None:
        logits = logits + bias.to(logps.dtype)[ids[mask]]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.zeros_like(logps).masked_scatter(mask, logits - logps[mask])
    loss = -logps
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.sum() / mask.sum().clamp(min=1)
    return loss, lse
