"""Groups of responses to one prompt: whole ones, and what is said of a reward within its group."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from apt_kernels import group_advantages


def complete_rows(rows: int, size: int) -> int:
    """Returns how many of `rows` are in complete groups; warns of the others.

    Raises:
        ValueError: not even one group is complete.
    """
    complete = rows - rows % size
    if complete == 0:
        raise ValueError(f"{rows} rows are fewer than one group of {size}")
    if complete < rows:
        warnings.warn(
            f"{rows - complete} of {rows} rows are an incomplete group of {size}: dropped",
            stacklevel=4,
        )
    return complete


def within_groups(
    rewards: Tensor, size: int, kind: str, abstains: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the advantages `(N,)` and the variances of the groups `(N / size,)`.

    Args:
        rewards: `(N,)`, groups are consecutive.
        size: of a group.
        kind: of the advantages, as `apt_kernels.group_advantages`.
        abstains: `(N,)`, True where there is no reward: that row has no part in its group, and an
            advantage of 0.
    """
    if abstains is None:
        return group_advantages(rewards, size, kind), _variances(rewards.view(-1, size))
    groups, without = rewards.view(-1, size), abstains.view(-1, size)
    rewarded = without.long().argsort(dim=1, stable=True)  # those with a reward come first
    advantages, variances = torch.zeros_like(groups), groups.new_zeros(len(groups))
    counts = (~without).sum(1)
    for count in range(1, size + 1):
        chosen = (counts == count).nonzero().squeeze(1)
        if len(chosen):
            places = chosen.unsqueeze(1), rewarded[chosen, :count]
            of_those = groups[places]
            found = group_advantages(of_those.flatten(), count, kind)
            advantages[places] = found.view_as(of_those).to(advantages.dtype)
            variances[chosen] = _variances(of_those)
    return advantages.flatten(), variances


def _variances(groups: Tensor) -> Tensor:
    """Returns the unbiased variance of each row; 0 for rows of one."""
    return groups.var(dim=1, correction=min(1, groups.shape[1] - 1))
