"""Advantages of rewards within their group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import GROUP_ADVANTAGE_KINDS
from ...reference.numerics import accumulate_dtype

KERNEL = "group_advantages_fwd"
dispatch.define(
    "group_advantages_fwd(Tensor rewards, int group_size, int kind, float eps) -> Tensor"
)
dispatch.register("group_advantages", KERNEL)


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group_size: int,
    kind: str = "relative",
    *,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """Each reward relative to its group of G = `group_size` consecutive rewards.

    "relative" is r - mean (Liu 2025). "normalized" is (r - mean) / (std + eps) with the unbiased
    std (Shao 2024). "rank" is (rank - (G-1)/2) / (G/2): the lowest reward has rank 0, equal rewards
    share their mean rank. "leave_one_out" is r - mean of the others (Ahmadian 2024). A group of one
    reward, and a group of equal rewards, give exactly 0.

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
    checks.choice("kind", kind, GROUP_ADVANTAGE_KINDS)
    checks.positive("eps", eps)
    backend = dispatch.choose("group_advantages", rewards.device, backend, rewards.dtype)
    if backend == "reference":
        return reference.group_advantages(rewards, group_size, kind, eps=eps)
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.float32)
    call = GroupAdvantagesCall(
        rewards=rewards.contiguous(),
        group_size=group_size,
        kind=GROUP_ADVANTAGE_KINDS[kind],
        eps=float(eps),
    )
    return dispatch.kernel(KERNEL, backend)(*call)


class GroupAdvantagesCall(NamedTuple):
    """The arguments of the kernel: contiguous floating rewards, and options as numbers."""

    rewards: Tensor
    group_size: int
    kind: int
    eps: float


@dispatch.fake(KERNEL)
def _(*fields):
    rewards = GroupAdvantagesCall(*fields).rewards
    return rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards))
