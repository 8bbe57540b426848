"""verl's functions under their own names. Nothing of verl is imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..ops.token_logprobs import token_logprobs


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`token_logprobs` as `verl.utils.torch_functional` names it.

    Args:
        logits: `(..., V)`, differentiable.
        labels: `(...)` integers in [0, V).
        inplace_backward: verl's permission to write the gradient over the logits. It is not used:
            the logits stay as they are, and the gradient is a tensor of its own.

    Returns:
        `(...)` float32 (float64 for float64 logits).
    """
    return token_logprobs(logits, labels)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """`linear_token_logprobs` with its entropy, as `verl.utils.kernel` names it.

    Args:
        hidden: `(..., D)`, differentiable; `N` rows in all.
        weight: `(V, D)`, differentiable.
        labels: `(...)` integers in [0, V).
        temperature: the logits are divided by it.
        reduction: of the log-probabilities: "none" `(N,)`, "sum" or "mean" (0 for no rows).
        dist_process_group: None. A head split over processes is refused.

    Returns:
        `(logprobs, entropy)`, both differentiable; the entropy `(N,)` whatever the reduction.
    """
    checks.choice("reduction", reduction, ("none", "sum", "mean"))
    checks.unused("dist_process_group", dist_process_group, "the vocabulary must be whole here")
    checks.tensor("hidden", hidden)
    checks.tensor("labels", labels, checks.INTEGERS)
    logps, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
    )
    if reduction != "none":
        logps = logps.sum() if reduction == "sum" else logps.sum() / max(logps.numel(), 1)
    return logps, entropy
