"""Where rewards come from: models, ensembles, and functions of tokens or of texts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.devices import device_of, evaluating
from ..scoring.model_access import without_wrapper
from ..scoring.sequence_scores import SequenceScores
from .reward_output import rewards_of


class RewardError(RuntimeError):
    """A reward model or function raised; the message says what."""


@dataclass
class Rewards:
    """The rewards of N sequences.

    Attributes:
        values: `(N,)`, 0 where a row abstains.
        abstains: `(N,)`, True where nothing was said of a sequence; None: of all something was.
        parts: the rewards of single functions, by name, where several were added.
    """

    values: Tensor
    abstains: Tensor | None = None
    parts: dict[str, Rewards] = field(default_factory=dict)

    def first(self, rows: int) -> Rewards:
        """Returns the rewards of the first so many sequences."""
        abstains = None if self.abstains is None else self.abstains[:rows]
        parts = {name: part.first(rows) for name, part in self.parts.items()}
        return Rewards(self.values[:rows], abstains, parts)


class RewardSource:
    """Rewards of sequences by a model or a function, in evaluation mode and without gradients.

    Args:
        reward_model: called as `rm(ids, masks)`, also with `response_token_mask=` (1 = token of
            the response), `rows=` (the positions of the prompts' rows, where the step was told
            them) and `finished=` (whether a response ended by itself) where its signature has
            these. It returns `{"rewards": (B, 1) or (B,)}`, such a tensor, or B numbers, of which
            None abstains; beside "rewards" the mapping may have "parts", rewards of the same forms
            by name. A module with parameters is given the ids where they are; anything else, where
            they come from. It may answer on any device.
    """

    def __init__(self, reward_model: Callable[..., Any]) -> None:
        if not callable(reward_model):
            raise TypeError(f"reward_model must be callable, got {type(reward_model).__name__}")
        self.model: Any = reward_model
        self._is_module = isinstance(reward_model, nn.Module)
        self._wanted = wanted_of(reward_model)
        self._call: Callable[..., Any] = _call_plainly
        if isinstance(reward_model, nn.Module):
            self._call = SequenceScores(reward_model)
        self._has_answered = False

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        masks: Tensor,
        token_mask: Tensor,
        rows: Tensor | None = None,
        finished: Tensor | None = None,
    ) -> Rewards:
        """Returns the rewards `(B,)` where `ids` are.

        Raises:
            RewardError: the reward model raised, or has abstained of all so far. ValueError: its
                rewards are not one finite number a row (finite is checked where looking does not
                wait).
        """
        home = ids.device
        known = {"response_token_mask": token_mask, "rows": rows, "finished": finished}
        given = {name: value for name, value in known.items() if name in self._wanted}
        if self._is_module and any(True for _ in self.model.parameters()):
            there = device_of(self.model)
            ids, masks = ids.to(there), masks.to(there)
            given = {k: None if v is None else v.to(there) for k, v in given.items()}
        try:
            with evaluating(self.model) if self._is_module else nullcontext():
                output = self._call(self.model, ids, masks, **given)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"the reward model failed on {len(ids)} sequences: {type(error).__name__}: {error}"
            ) from error
        rewards = checked_rewards("the reward model's rewards", output, len(ids), home)
        self._check_answered(rewards)
        return rewards

    def _check_answered(self, rewards: Rewards) -> None:
        """Raises where nothing but None has come so far; warns where a later batch has no reward.

        A function without a `return` would else train on nothing.
        """
        if rewards.abstains is None or not rewards.abstains.all():
            self._has_answered = True
            return
        whose = getattr(self.model, "description", "the reward model")
        message = f"{whose} returned None for all {len(rewards.values)} responses of a batch"
        if not self._has_answered:
            raise RewardError(
                f"{message}: expected a number for some of them (is there a `return`?)"
            )
        warnings.warn(f"{message}: nothing is learned from it", stacklevel=2)


def _call_plainly(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
    return function(*given, **more)


def wanted_of(reward_model: Callable[..., Any]) -> set[str]:
    """Returns the names in the signature of a reward model."""
    called = reward_model
    if isinstance(reward_model, nn.Module):
        called = without_wrapper(reward_model).forward
    try:
        return set(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # of some built-in callables
        return set()


def wants_token_mask(reward_model: Callable[..., Any]) -> bool:
    """Returns whether the signature of a reward model has `response_token_mask`."""
    return "response_token_mask" in wanted_of(reward_model)


def checked_rewards(name: str, rewards: Any, rows: int, device: torch.device) -> Rewards:
    """Returns rewards, in any form a reward model may return, as floats `(rows,)` on `device`."""
    parts = rewards.get("parts", {}) if isinstance(rewards, Mapping) else {}
    if isinstance(rewards, Mapping) and "rewards" in rewards:
        rewards = rewards["rewards"]
    values, abstains = _checked_values(name, rewards, rows, device)
    of_parts = {
        part: Rewards(*_checked_values(f"{name} {part!r}", given, rows, device))
        for part, given in parts.items()
    }
    return Rewards(values, abstains, of_parts)


def _checked_values(
    name: str, rewards: Any, rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    rewards, abstains = _without_none(rewards)
    rewards = rewards_of(rewards, rows, name).detach()
    if rewards.device.type == "cpu" and not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(rewards[row])} in row {row}")
    return rewards.to(device), None if abstains is None else abstains.to(device)


def _without_none(rewards: Any) -> tuple[Any, Tensor | None]:
    """Returns a list with 0 instead of None, and where None was."""
    if not isinstance(rewards, (list, tuple)) or all(reward is not None for reward in rewards):
        return rewards, None
    missing = torch.tensor([reward is None for reward in rewards])
    return [0.0 if reward is None else reward for reward in rewards], missing


def check_special_tokens(choice: str) -> None:
    """Raises ValueError unless texts can be given to rewards so."""
    if choice not in ("strip", "keep"):
        raise ValueError(f"special_tokens must be 'strip' or 'keep', got {choice!r}")


class TextReward:
    """A reward function of texts as a reward model.

    Args:
        function: called as `function(prompts, responses)`, two lists of strings; returns as many
            numbers, or None where it abstains.
        tokenizer: has `batch_decode`, as those of Hugging Face.
        special_tokens: "strip" leaves special tokens out of the texts, "keep" keeps them.
    """

    def __init__(
        self,
        function: Callable[[list[str], list[str]], Sequence[float | None]],
        tokenizer: Any,
        special_tokens: str = "strip",
    ) -> None:
        check_special_tokens(special_tokens)
        self._function = function
        self._tokenizer = tokenizer
        self._strips = special_tokens == "strip"

    def __call__(
        self, ids: Tensor, masks: Tensor, response_token_mask: Tensor
    ) -> Sequence[float | None]:
        """Returns the function's numbers of the decoded sequences."""
        real, response = masks != 0, response_token_mask != 0

        def texts(kept: Tensor) -> list[str]:
            rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), kept.cpu(), strict=True)]
            return self._tokenizer.batch_decode(rows, skip_special_tokens=self._strips)

        return self._function(texts(real & ~response), texts(real & response))
