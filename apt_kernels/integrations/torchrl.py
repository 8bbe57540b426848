"""torchrl's functional GAE under its own name. Nothing of torchrl is imported."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..ops.policy.gae import gae


def generalized_advantage_estimate(
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """`gae` of one-step errors: the value after a step is what torchrl's caller says it is.

    No gradient is computed: an input that requires grad is an error, where torchrl differentiates.

    Args:
        gamma: discount, in [0, 1].
        lmbda: decay of the trace, in [0, 1].
        state_value: `(*B, T, F)`, or another order with `time_dim`.
        next_state_value: the value of the state after each step; not read where it terminated.
        reward: as all others.
        done: True where the trajectory ended.
        terminated: True where the episode did; None: as `done`.
        time_dim: the dimension of the steps.

    Returns:
        `(advantage, value_target)` as state_value; float32, or float64 where an input is.
    """
    inputs = {
        "state_value": state_value, "next_state_value": next_state_value, "reward": reward
    }  # fmt: skip
    flags = {"done": done, "terminated": done if terminated is None else terminated}
    checks.tensor("state_value", state_value)
    for name, value in (inputs | flags).items():
        checks.tensor(name, value, (torch.bool,) if name in flags else checks.FLOATS)
        checks.shape(name, value, state_value.shape, "that of state_value")
        checks.same_device(name, value, "state_value", state_value)
        checks.constant(name, value)
    checks.integer("time_dim", time_dim, -state_value.dim(), state_value.dim())
    following = next_state_value.masked_fill(flags["terminated"], 0.0)
    error = (reward + gamma * following - state_value).movedim(time_dim, -1)
    rows = error.reshape(math.prod(error.shape[:-1]), error.shape[-1])
    ends = done.movedim(time_dim, -1).reshape(rows.shape)
    advantage, _ = gae(
        rows, torch.zeros_like(rows), gamma=gamma, gae_lambda=lmbda, truncated=ends
    )  # fmt: skip
    advantage = advantage.reshape(error.shape).movedim(-1, time_dim)
    return advantage, advantage + state_value
