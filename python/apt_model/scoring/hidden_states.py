"""The last hidden states of any model, however it returns them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .model_access import base_model, has_adapter, without_wrapper


class HiddenStates:
    """How a model is called for its last hidden states; made once, as it reads the signature.

    Args:
        model: takes `input_ids` and `attention_mask` by keyword. Where its signature has them it
            is also given `output_hidden_states=True`, `use_cache=False`, `logits_to_keep=1` (of
            its logits nothing is used) and positions that count real tokens alone.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = base_model(model)
        accepted = inspect.signature(inner.forward).parameters
        more = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self._options: dict[str, Any] = {}
        if "output_hidden_states" in accepted or (more and has_output_embedding(inner)):
            self._options["output_hidden_states"] = True
        if "use_cache" in accepted:
            self._options["use_cache"] = False
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1
        self._positions = Positions(model)

    def __call__(self, model: nn.Module, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns `model`'s last hidden states, `(B, S, H)`.

        Args:
            model: the one this was made of.
            ids: `(B, S)`.
            attention_mask: `(B, S)`, 1 = real token; None: all are.
        """
        ids, positions = self._positions(ids, attention_mask)
        options = {**self._options, **positions}
        hidden = hidden_states_of(model(input_ids=ids, attention_mask=attention_mask, **options))
        if hidden.dim() != 3 or hidden.shape[0] != len(ids):
            raise ValueError(
                f"{type(base_model(model)).__name__} must return hidden states (B, S, H) for ids "
                f"{tuple(ids.shape)}, got {tuple(hidden.shape)}"
            )
        return hidden[:, -ids.shape[1] :]  # adapters that learn a prompt put tokens in front


def hidden_states_of(output: Any) -> Tensor:
    """Returns the last hidden states in what a model returned.

    A tensor, `last_hidden_state` or the last of `hidden_states` (as attributes or keys), or the
    first item of a tuple.
    """
    if isinstance(output, Tensor):
        return output
    last = found(output, "last_hidden_state")
    if last is not None:
        return last
    layers = found(output, "hidden_states", (Tensor, tuple, list))
    if layers is not None and len(layers):
        return layers if isinstance(layers, Tensor) else layers[-1]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        "a model must return its hidden states: bare, as `last_hidden_state`, as the last of "
        f"`hidden_states` or first in a tuple; got {type(output).__name__}"
    )


def found(output: Any, name: str, kinds: Any = Tensor) -> Any:
    """Returns what a model's output holds by this name, attribute or key, if it is of `kinds`."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, kinds) else None


def has_output_embedding(inner: nn.Module) -> bool:
    """Returns whether a model makes logits, as Hugging Face models tell it."""
    getter = getattr(inner, "get_output_embeddings", None)
    return callable(getter) and getter() is not None


class Positions:
    """How a model's positions come to count real tokens alone; made once.

    A model that takes `position_ids` is told them, unless an adapter puts a learned prompt in
    front. One that counts the tokens that are not its padding id, as RoBERTa does, gets this id
    where there is padding.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = base_model(model)
        adapters: Any = without_wrapper(model).peft_config if has_adapter(model) else {}
        learned = any(getattr(a, "is_prompt_learning", False) for a in adapters.values())
        paddings = (
            getattr(part, "padding_idx", None)
            for name, part in inner.named_modules()
            if name.endswith("position_embeddings")
        )
        self._padding = next((padding for padding in paddings if padding is not None), None)
        accepted = inspect.signature(inner.forward).parameters
        self.are_told = "position_ids" in accepted and not learned and self._padding is None

    def __call__(
        self, ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the ids `(B, S)` and the options to call the model with."""
        if attention_mask is None:
            return ids, {}
        if self._padding is not None:
            return ids.masked_fill(attention_mask == 0, self._padding), {}
        return ids, {"position_ids": real_positions(attention_mask)} if self.are_told else {}


def real_positions(attention_mask: Tensor) -> Tensor:
    """Returns the position of each token among the real ones of its row, `(B, S)`."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_real(attention_mask: Tensor) -> Tensor:
    """Returns the column of each row's last real token, `(B,)`; 0 where none is."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).amax(-1)
