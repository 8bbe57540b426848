"""How a reward model is called for one number a sequence."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .hidden_states import Positions
from .model_access import base_model


class SequenceScores:
    """Calls a reward model; made once, as it reads the signature.

    A classifier of transformers finds the last token of a row by its padding id, so padding is
    given that id, and its positions count real tokens alone. Any other module is called with ids
    and mask.

    Args:
        model: the reward model, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = base_model(model)
        self._is_classifier = hasattr(inner, "config") and callable(
            getattr(inner, "get_input_embeddings", None)
        )
        if not self._is_classifier:
            return
        self._padding = getattr(inner.config, "pad_token_id", None)
        is_classifier = type(inner).__name__.endswith("ForSequenceClassification")
        self._needs_padding = is_classifier and reads_left_to_right(inner)
        self._positions = Positions(model)

    def __call__(
        self, model: nn.Module, ids: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> Any:
        """Returns what the model returns of ids `(B, S)`; `more` is for models of one's own.

        Raises:
            ValueError: a classifier that must know its padding does not.
        """
        if not self._is_classifier:
            return model(ids, attention_mask, **more)
        if attention_mask is not None and self._padding is not None:
            ids = ids.masked_fill(attention_mask == 0, self._padding)
        elif self._needs_padding and self._padding is None and len(ids) > 1:
            raise ValueError(
                "the reward model's config.pad_token_id: expected an id, as it scores the last "
                "token that is no padding, got None"
            )
        ids, positions = self._positions(ids, attention_mask)
        return model(input_ids=ids, attention_mask=attention_mask, **positions)


def reads_left_to_right(inner: nn.Module) -> bool:
    """Returns whether a model is a decoder, whose classifiers score the last real token."""
    accepted = inspect.signature(inner.forward).parameters
    return "use_cache" in accepted or "past_key_values" in accepted
