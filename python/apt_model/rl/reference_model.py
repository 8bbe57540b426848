"""The frozen model a policy is compared with: one that is given, a copy, or no adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..scoring.devices import device_of, evaluating
from ..scoring.model_access import (
    FSDPModule,
    base_model,
    has_adapter,
    vocabulary_size,
    without_wrapper,
)
from ..scoring.next_token import NextTokenScorer
from ..training.state import snapshot
from .shared_prefix import SharedPrefix

START = "start"
Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


class ReferenceModel:
    """Scores tokens under the reference of a policy, without gradients, in evaluation mode.

    Args:
        policy: the scorer of the policy.
        model: the reference. None: the policy with its adapter disabled where it has one, else a
            frozen copy of it as it is now; "start": such a copy, of an adapter too. The copy shares
            the policy's frozen parameters and takes over the output of its frozen first layers, so
            that a policy of which only the last layers are trained costs only those layers once
            more, in memory and in time.
        device: where a given model is moved.
    """

    def __init__(
        self, policy: NextTokenScorer, model: nn.Module | str | None, device: torch.device
    ) -> None:
        if isinstance(model, str) and model != START:
            raise ValueError(f"ref_policy_model must be a model, None or 'start', got {model!r}")
        wants_copy = isinstance(model, str) or (model is None and not has_adapter(policy.model))
        model = None if isinstance(model, str) else model
        self._policy = policy
        self._shared: list[nn.Parameter] = []
        self._copied: nn.Module | None = None
        self.model = model
        if model is not None:
            _reject_own_reference(policy.model, model)
            if device_of(model) != device:
                model.to(device)
            model.eval()
        elif wants_copy:
            self.model = self._copied = self._frozen_copy(without_wrapper(policy.model))
        self._prefix = SharedPrefix.of(without_wrapper(policy.model), self._copied)
        self._scorer = policy if self.model is None else policy.of_model(self.model)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        mask: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """Returns the log-probabilities `(B, S-1)` as `NextTokenScorer` does."""
        if any(parameter.requires_grad for parameter in self._shared):
            raise RuntimeError(
                "parameters that were frozen when the trainer was made now require gradients, but "
                "the reference shares them: make the trainer afterwards, or pass a reference model"
            )
        with torch.no_grad(), self._active():
            return self._prefix.run(
                lambda: self._scorer(input_ids, attention_mask, mask, temperature=temperature)
            )

    def beside(
        self, policy: Callable[[], Ours], reference: Callable[[], Theirs]
    ) -> tuple[Ours, Theirs]:
        """Returns what the policy and this reference say of one batch, in the cheaper order.

        The reference comes second where it takes over what the policy computed, and else first:
        what it needs for itself is free again before the policy keeps its activations.
        """
        if self._prefix:
            with self._prefix.recording():
                ours = policy()
            theirs = reference()
        else:
            theirs = reference()
            ours = policy()
        sizes = self._policy.vocabulary_size, self._scorer.vocabulary_size
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"the policy has a vocabulary of {sizes[0]} tokens, ref_policy_model of {sizes[1]}"
            )
        return ours, theirs

    @contextmanager
    def _active(self) -> Iterator[None]:
        if self.model is not None:
            yield
            return
        adapted = without_wrapper(self._policy.model)
        with evaluating(adapted), adapted.disable_adapter():
            yield

    def _frozen_copy(self, policy: nn.Module) -> nn.Module:
        if isinstance(policy, FSDPModule):
            raise ValueError(
                "an FSDP2-sharded policy cannot be copied: pass ref_policy_model= (sharded the "
                "same way), or precomputed_reference=True with reference log-probabilities"
            )
        self._shared = [p for p in policy.parameters() if not p.requires_grad]
        model = copy.deepcopy(policy, {id(p): p for p in self._shared})
        return model.requires_grad_(False).eval()

    def _copied_tensors(self) -> dict[str, Tensor]:
        shared = {id(p) for p in self._shared}
        state = self._copied.state_dict(keep_vars=True) if self._copied is not None else {}
        return {name: tensor for name, tensor in state.items() if id(tensor) not in shared}

    def state_dict(self) -> dict[str, Any]:
        """Returns the tensors of the copy that the policy does not hold; nothing without a copy."""
        return snapshot(self._copied_tensors())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Makes the copy the one that was saved."""
        tensors = self._copied_tensors()
        if tensors.keys() != state.keys():
            raise ValueError(
                "the state has another reference than this trainer; they differ in "
                f"{sorted(tensors.keys() ^ state.keys())[:5]}"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])


def _reject_own_reference(policy: nn.Module, reference: nn.Module) -> None:
    trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    if base_model(reference) is base_model(policy) or any(
        id(parameter) in trained for parameter in reference.parameters()
    ):
        raise ValueError(
            "ref_policy_model is the policy itself, or shares parameters that are trained: it "
            "would follow the policy. Pass another model, or None for a frozen copy"
        )
    ours, theirs = vocabulary_size(policy), vocabulary_size(reference)
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(f"ref_policy_model has a vocabulary of {theirs} tokens, the policy {ours}")
