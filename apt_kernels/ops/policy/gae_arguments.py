"""The arguments of gae: what is rejected."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks


def check_options(gamma: float, gae_lambda: float, whiten: bool, time_major: bool) -> None:
    checks.between("gamma", gamma, 0, 1)
    checks.between("gae_lambda", gae_lambda, 0, 1)
    checks.flag("whiten", whiten)
    checks.flag("time_major", time_major)


def check_steps(
    rewards: Tensor, values: Tensor, time_major: bool, cu_seqlens: Tensor | None
) -> None:
    checks.tensor("rewards", rewards)
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
    checks.dims("rewards", rewards, 2 if cu_seqlens is None else 1)
    checks.pair("values", values, "rewards", rewards)
    if cu_seqlens is None:
        return
    if time_major:
        raise ValueError(
            "time_major: expected False (packed sequences have one dimension), got True"
        )
    checks.dims("cu_seqlens", cu_seqlens, 1)
    checks.same_device("cu_seqlens", cu_seqlens, "rewards", rewards)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected at least one offset, got none")


def check_flags(rewards: Tensor, **flags: Tensor | None) -> None:
    for name, flag in flags.items():
        if flag is not None:
            checks.token_mask(name, flag, "rewards", rewards)


def check_bootstrap(
    bootstrap: Tensor | None, rewards: Tensor, time_major: bool, cu_seqlens: Tensor | None
) -> None:
    if bootstrap is None:
        return
    checks.tensor("bootstrap", bootstrap)
    checks.same_device("bootstrap", bootstrap, "rewards", rewards)
    if cu_seqlens is not None:
        rows = cu_seqlens.shape[0] - 1
    else:
        rows = rewards.shape[1 if time_major else 0]
    if tuple(bootstrap.shape) not in ((rows,), tuple(rewards.shape)):
        raise ValueError(
            f"bootstrap: expected shape {(rows,)} (one a sequence) or {tuple(rewards.shape)} "
            f"(one a step), got {tuple(bootstrap.shape)}"
        )
