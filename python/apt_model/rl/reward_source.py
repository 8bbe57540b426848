"""Where rewards come from: models and functions of tokens or of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def rewards_of(output: Any) -> Tensor:
    """Returns the rewards `(B,)` in what a reward model returned: `{"rewards": …}` or a tensor."""
    rewards = output["rewards"] if isinstance(output, Mapping) else output
    if not isinstance(rewards, Tensor) or rewards.dim() not in (1, 2):
        raise TypeError(f"a reward model must return rewards (B, 1) or (B,), got {type(rewards)}")
    return rewards.squeeze(-1) if rewards.dim() == 2 else rewards


def check_real_rows(name: str, mask: Tensor) -> None:
    """Raises ValueError for a row without a real token, where looking does not wait."""
    if mask.device.type != "cpu":
        return
    empty = (mask == 0).all(-1).nonzero()
    if len(empty):
        raise ValueError(f"row {int(empty[0])} of {name} has no real token")
