"""Where rewards come from: models, ensembles, and functions of tokens or of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.model_access import without_wrapper
from ..training.options import device_of, evaluating


class RewardError(RuntimeError):
    """A reward model or function raised; the message says what."""


class RewardSource:
    """Rewards of sequences by a model or a function, in evaluation mode and without gradients.

    Args:
        reward_model: called as `rm(ids, masks)`, also with `response_token_mask=` where its
            signature has that; returns `{"rewards": (B, 1) or (B,)}`, such a tensor, or B numbers.
            A module with parameters is given the ids where they are; anything else, where they
            come from. It may answer on any device.
    """

    def __init__(self, reward_model: Callable[..., Any]) -> None:
        if not callable(reward_model):
            raise TypeError(f"reward_model must be callable, got {type(reward_model).__name__}")
        self.model = reward_model
        self._is_module = isinstance(reward_model, nn.Module)
        self._wants_token_mask = wants_token_mask(reward_model)

    @torch.no_grad()
    def __call__(self, ids: Tensor, masks: Tensor, token_mask: Tensor) -> Tensor:
        """Returns the rewards `(B,)` where `ids` are.

        Raises:
            RewardError: the reward model raised. ValueError: its rewards are not one finite
                number a row (finite is checked where looking does not wait).
        """
        home = ids.device
        if self._is_module and any(True for _ in self.model.parameters()):
            ids, masks, token_mask = (t.to(device_of(self.model)) for t in (ids, masks, token_mask))
        options = {"response_token_mask": token_mask} if self._wants_token_mask else {}
        try:
            with evaluating(self.model) if self._is_module else nullcontext():
                output = self.model(ids, masks, **options)
        except Exception as error:
            raise RewardError(
                f"the reward model failed on {len(ids)} sequences: {type(error).__name__}: {error}"
            ) from error
        return checked_rewards("the reward model's rewards", output, len(ids), home)


def wants_token_mask(reward_model: Callable[..., Any]) -> bool:
    """Returns whether the signature of a reward model has `response_token_mask`."""
    is_module = isinstance(reward_model, nn.Module)
    called = without_wrapper(reward_model).forward if is_module else reward_model
    try:
        return "response_token_mask" in inspect.signature(called).parameters
    except (TypeError, ValueError):  # of some built-in callables
        return False


def checked_rewards(name: str, rewards: Any, rows: int, device: torch.device) -> Tensor:
    """Returns rewards, in any form a reward model may return, as floats `(rows,)` on `device`."""
    rewards = _as_tensor(name, rewards, rows)
    if rewards.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{name} must be one a row, {rows}, got {tuple(rewards.shape)}")
    rewards = rewards.detach().reshape(rows)
    if rewards.dtype not in (torch.float32, torch.float64):
        rewards = rewards.float()
    if rewards.device.type == "cpu" and not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(rewards[row])} in row {row}")
    return rewards.to(device)


def _as_tensor(name: str, rewards: Any, rows: int) -> Tensor:
    found = rewards.get("rewards") if isinstance(rewards, Mapping) else rewards
    if not isinstance(found, Tensor):
        try:
            found = torch.as_tensor(found, dtype=torch.float64).to(torch.float32)
        except (TypeError, ValueError, RuntimeError):
            found = None
    if found is None or found.is_complex():
        came = type(rewards).__name__
        came += f" with {list(rewards)}" if isinstance(rewards, Mapping) else ""
        raise ValueError(
            f"{name} must be a tensor, {rows} numbers or {{'rewards': …}} of them, got {came}"
        )
    return found


class TextReward:
    """A reward function of texts as a reward model.

    Args:
        function: called as `function(prompts, responses)`, two lists of strings, special tokens
            left out; returns as many numbers.
        tokenizer: has `batch_decode`, as those of Hugging Face.
    """

    def __init__(
        self, function: Callable[[list[str], list[str]], Sequence[float]], tokenizer: Any
    ) -> None:
        self._function = function
        self._tokenizer = tokenizer

    def __call__(self, ids: Tensor, masks: Tensor, response_token_mask: Tensor) -> Sequence[float]:
        """Returns the function's numbers of the decoded sequences."""
        real, response = masks != 0, response_token_mask != 0

        def texts(kept: Tensor) -> list[str]:
            rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), kept.cpu(), strict=True)]
            return self._tokenizer.batch_decode(rows, skip_special_tokens=True)

        return self._function(texts(real & ~response), texts(real & response))


def rewards_of(output: Any) -> Tensor:
    """Returns the rewards `(B,)` in what a reward model returned, with their graph."""
    rewards = output["rewards"] if isinstance(output, Mapping) else output
    if isinstance(rewards, (list, tuple)):
        rewards = torch.tensor(rewards, dtype=torch.float32)
    if not isinstance(rewards, Tensor) or rewards.dim() not in (1, 2):
        raise TypeError(f"a reward model must return rewards (B, 1) or (B,), got {type(rewards)}")
    return rewards.squeeze(-1) if rewards.dim() == 2 else rewards
