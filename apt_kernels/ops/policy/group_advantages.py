"""Advantages of rewards within their group."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype

dispatch.define(
    "group_advantages_fwd(Tensor rewards, int group_size, int kind, float eps) -> Tensor"
)
dispatch.register("group_advantages", "group_advantages_fwd")

_KINDS = {"relative": 0, "normalized": 1, "rank": 2, "leave_one_out": 3}


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group_size: int,
    kind: str = "relative",
    *,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """Each reward relative to its group of G = `group_size` consecutive ones.

    "relative": r - mean (Liu 2025); "normalized": (r - mean) / (std + eps), unbiased std (Shao
    2024); "rank": (rank - (G-1)/2) / (G/2), 0 the lowest, ties averaged; "leave_one_out": r - mean
    of the others (Ahmadian 2024). A group of one, and a group of equal rewards, give exactly 0.

    Args:
        rewards: `(N,)`, N a multiple of `group_size`; floats or integers; any strides; no
            gradient is computed.
        group_size: G, at least 1.
        kind: one of those above.
        eps: added to the standard deviation, above 0.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(N,)` float32 (float64 for float64 rewards).

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    checks.tensor("rewards", rewards, (*checks.FLOATS, *checks.INTEGERS, torch.bool))
    checks.dims("rewards", rewards, 1)
    checks.integer("group_size", group_size)
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the number of rewards, {rewards.shape[0]}, "
            f"got {group_size}"
        )
    checks.choice("kind", kind, _KINDS)
    checks.positive("eps", eps)
    backend = dispatch.choose("group_advantages", rewards.device, backend, rewards.dtype)
    if backend == "reference":
        return reference.group_advantages(rewards, group_size, kind, eps=eps)
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.float32)
    return dispatch.kernel("group_advantages_fwd", backend)(
        rewards.contiguous(), group_size, _KINDS[kind], float(eps)
    )


@dispatch.fake("group_advantages_fwd")
def _(rewards, group_size, kind, eps):
    dtype = accumulate_dtype(rewards)
    return rewards.new_empty(rewards.shape, dtype=dtype)
