"""Reward models: a score of a text, learned from preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.hidden_states import HiddenStates, last_real
from ..scoring.model_access import hidden_width
from .batch_checks import check_real_rows
from .pair_batch import make_pair_batch
from .reward_output import rewards_of
from .reward_source import wants_token_mask
from .reward_trainer import RewardModelTrainer

__all__ = ["RewardEnsemble", "RewardModel", "RewardModelTrainer", "create_reward_model"]

POOLINGS = ("last", "mean", "max")


class RewardModel(nn.Module):
    """A base model and a head that scores its pooled last hidden states.

    Args:
        base_model: called as `model(input_ids=…, attention_mask=…)`; what it may return is in
            `hidden_states_of`.
        hidden_size: width of its hidden states.
        num_layers: linear layers of the head.
        dropout: between them.
        use_pooling: "last" real token, or "mean" or "max" over the real tokens; padding may be on
            either side.
    """

    def __init__(
        self,
        base_model: nn.Module,
        hidden_size: int = 768,
        num_layers: int = 1,
        dropout: float = 0.1,
        use_pooling: str = "last",
    ) -> None:
        super().__init__()
        if use_pooling not in POOLINGS:
            raise ValueError(f"use_pooling must be one of {POOLINGS}, got {use_pooling!r}")
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout!r}")
        known = hidden_width(base_model)
        if known not in (None, hidden_size):
            raise ValueError(
                f"hidden_size: expected {known}, the width of the base model, got {hidden_size}"
            )
        self.base_model = base_model
        self.hidden_size = hidden_size
        self.use_pooling = use_pooling
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
        self.value_head = nn.Sequential(*layers, nn.Linear(hidden_size, 1))
        floats = (p for p in base_model.parameters() if p.is_floating_point())
        first = next(floats, None)
        if first is not None:
            self.value_head.to(first.device, first.dtype)
        self._hidden_states = HiddenStates(base_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> dict[str, Tensor]:
        """Returns `rewards` `(B, 1)`, and the base's `hidden_states` `(B, S, H)` where wanted.

        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; None: all are. A row without one is an error
                on the CPU and has the reward NaN elsewhere (an error would wait for the device).
            return_hidden_states: also return them.
        """
        if attention_mask is not None:
            check_real_rows("attention_mask", attention_mask)
        hidden = self._hidden_states(self.base_model, input_ids, attention_mask)
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but the base model's hidden states are "
                f"{hidden.shape[-1]} wide"
            )
        rewards = self.value_head(self._pooled(hidden, attention_mask))
        rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        return {"rewards": rewards, **({"hidden_states": hidden} if return_hidden_states else {})}

    def _pooled(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            if self.use_pooling == "last":
                return hidden[:, -1]
            return hidden.mean(1) if self.use_pooling == "mean" else hidden.amax(1)
        real = (attention_mask != 0).unsqueeze(-1)
        count = real.sum(1)
        if self.use_pooling == "last":
            rows = torch.arange(len(hidden), device=hidden.device)
            pooled = hidden[rows, last_real(attention_mask)]
        elif self.use_pooling == "mean":
            pooled = hidden.masked_fill(~real, 0).sum(1) / count
        else:
            pooled = hidden.masked_fill(~real, -torch.inf).amax(1)
        return pooled.masked_fill(count == 0, torch.nan)

    def get_rewards(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns the rewards, `(B, 1)`."""
        return self(input_ids, attention_mask)["rewards"]

    def compare_responses(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the rewards of both, `(B, 1)` each, of one forward pass."""
        batch = make_pair_batch(
            chosen_ids, rejected_ids, chosen_mask, rejected_mask, device=chosen_ids.device
        )
        ids, mask, _ = batch.sequences()
        chosen, rejected = self.get_rewards(ids, mask).chunk(2)
        return chosen, rejected


class RewardEnsemble(nn.Module):
    """Several reward models as one: the mean of their rewards, or the smallest (Coste 2023).

    Args:
        models: at least one module or function, called as `model(ids, masks)`, also with
            `response_token_mask=` where its signature has that.
        reduce: "mean" or "min".
    """

    def __init__(self, models: Sequence[Callable[..., Any]], reduce: str = "mean") -> None:
        super().__init__()
        if not models:
            raise ValueError("models must hold at least one reward model")
        if reduce not in ("mean", "min"):
            raise ValueError(f"reduce must be mean or min, got {reduce!r}")
        self.models = nn.ModuleList(m for m in models if isinstance(m, nn.Module))
        self._members = [(model, wants_token_mask(model)) for model in models]
        self.reduce = reduce

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        response_token_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns `rewards` `(B, 1)` of ids `(B, S)`; masks as `RewardSource` gives them."""
        members = (
            rewards_of(
                member(input_ids, attention_mask, response_token_mask=response_token_mask)
                if wanted
                else member(input_ids, attention_mask),
                len(input_ids),
            )
            for member, wanted in self._members
        )
        each = torch.stack([rewards.to(input_ids.device) for rewards in members])
        rewards = each.mean(0) if self.reduce == "mean" else each.amin(0)
        return {"rewards": rewards.unsqueeze(-1)}


def create_reward_model(
    base_model: nn.Module, hidden_size: int = 768, **kwargs: Any
) -> RewardModel:
    """Returns a `RewardModel`; keywords are its other options."""
    return RewardModel(base_model, hidden_size, **kwargs)
