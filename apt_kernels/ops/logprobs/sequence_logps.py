"""Sums of the log-probabilities of sequences."""

from __future__ import annotations

from torch import Tensor

from ... import checks, dispatch, reference
from ..common.sequences import BACKWARD, FORWARD, summed_logps

dispatch.register("sequence_logps", FORWARD, BACKWARD)


def sequence_logps(
    logps: Tensor, mask: Tensor, *, average: bool = False, backend: str | None = None
) -> Tensor:
    """The sum (or the mean) of each row's log-probabilities where `mask` counts.

    Reads both tensors once; backward reads the mask and writes the gradient.

    Args:
        logps: `(B, T)` float32, bfloat16, float16 or float64; any strides; differentiable. A
            masked slot may hold anything, and its gradient is exactly 0.
        mask: `(B, T)`, True counts.
        average: divide by the number of tokens that count.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(B,)` in nats, float32 (float64 for float64 logps); 0 for a row of no tokens.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("logps", logps)
    checks.dims("logps", logps, 2)
    checks.token_mask("mask", mask, "logps", logps)
    checks.flag("average", average)
    backend = dispatch.choose("sequence_logps", logps.device, backend, logps.dtype)
    if backend == "reference":
        return reference.sequence_logps(logps, mask, average=average)
    return summed_logps(logps, mask, average, backend)
