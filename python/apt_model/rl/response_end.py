"""Where a sampled response ends: at an end token of the model, or with a text that is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.hidden_states import last_real
from ..scoring.model_access import base_model

MARGIN = 4  # tokens before a stop string: SentencePiece drops the space of the first one it decodes


class StopRules:
    """The rules that end a response.

    Args:
        end_tokens: ids that end it.
        stop_strings: texts that end it, with the token in which they are complete. A text that is a
            special token of the tokenizer is taken as an end token.
        tokenizer: decodes what is sampled; needed for texts.

    Attributes:
        tokens: ids that end a response.
        strings: texts that end it.
        window: how many tokens a text that ends a response has at most.
    """

    def __init__(
        self, end_tokens: Sequence[int], stop_strings: Sequence[str] = (), tokenizer: Any = None
    ) -> None:
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if any(not isinstance(text, str) or not text for text in stop_strings):
            raise ValueError(f"stop_strings: expected texts, not empty, got {stop_strings!r}")
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings: expected a tokenizer too, that decodes what is sampled")
        special = _special_tokens(tokenizer) if stop_strings else {}
        more = [special[text] for text in stop_strings if text in special]
        self.tokens = list(dict.fromkeys([*end_tokens, *more]))
        self.strings = [text for text in stop_strings if text not in special]
        self._tokenizer = tokenizer
        longest = max((len(text.encode()) for text in self.strings), default=0)
        self.window = longest + MARGIN  # a token has a byte or more

    def __bool__(self) -> bool:
        """Whether anything ends a response but its room."""
        return bool(self.tokens or self.strings)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Returns where `tokens` are end tokens."""
        return torch.isin(tokens, torch.tensor(self.tokens, dtype=torch.long, device=tokens.device))

    def has_stop(self, tail: Sequence[int]) -> bool:
        """Returns whether the last `window` tokens of a response hold a stop string."""
        text = self._tokenizer.decode(list(tail), skip_special_tokens=False)
        return any(stop in text for stop in self.strings)

    def finished(self, ids: Tensor, response: Tensor) -> Tensor:
        """Returns which sequences end as a response ends by itself, `(N,)`.

        Args:
            ids: `(N, S)`.
            response: `(N, S)`, True at the tokens of the responses.
        """
        last = last_real(response)
        ended = self.is_end(ids.gather(1, last.unsqueeze(1)).squeeze(1)) & response.any(1)
        if self.strings:
            rows = zip(ids.cpu(), response.cpu(), strict=True)
            stopped = [self.has_stop(row[kept][-self.window :].tolist()) for row, kept in rows]
            ended = ended | torch.tensor(stopped, device=ended.device)
        return ended


class FoundEnds:
    """The ends of the responses of one batch, found as they are sampled.

    Args:
        rules: what ends a response.
        rows: how many responses there are.
        device: where their tokens are.
    """

    def __init__(self, rules: StopRules, rows: int, device: torch.device) -> None:
        self._rules = rules
        self._stopped = [0] * rows  # after how many tokens a stop string was complete; 0: not yet
        self._device = device
        self._none = torch.zeros(rows, dtype=torch.bool, device=device)

    def stopped_by_text(self, new: Tensor) -> Tensor:
        """Looks for stop strings that the last tokens of `new` `(B, T)` complete.

        Returns:
            `(B,)`, True for responses that had one, now or before.
        """
        if not self._rules.strings:
            return self._none
        for row, tail in enumerate(new[:, -self._rules.window :].tolist()):
            if not self._stopped[row] and self._rules.has_stop(tail):
                self._stopped[row] = new.shape[1]
        return torch.tensor([length > 0 for length in self._stopped], device=self._device)

    def lengths(self, new: Tensor, rooms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the length `(B,)` of each response and whether it ended by itself.

        Args:
            new: `(B, T)`, what was sampled.
            rooms: `(B,)`, the largest length of each.
        """
        never = new.shape[1] + 1
        ends = self._rules.is_end(new)
        by_token = torch.where(ends.any(1), ends.long().argmax(1) + 1, never)
        by_text = torch.tensor(self._stopped, device=new.device)
        by_text = by_text.masked_fill(by_text == 0, never)
        end = torch.minimum(by_token, by_text)
        room = rooms.clamp(max=new.shape[1])
        return torch.minimum(end, room), end <= room


def read_end_tokens(
    model: nn.Module, given: int | Sequence[int] | None = None, tokenizer: Any = None
) -> list[int]:
    """Returns the tokens that end a response.

    Those that are given, or else all that the tokenizer, the model's generation settings and its
    configuration name: a chat model's end of turn often stands in one of them alone.
    """
    if given is not None:
        return _ids(given)
    inner = base_model(model)
    config = getattr(inner, "config", None)
    nested = getattr(config, "get_text_config", None)  # of models of images and texts
    holders = [
        getattr(inner, "generation_config", None),
        config,
        nested() if callable(nested) else None,
        tokenizer,
    ]
    found = (token for holder in holders for token in _ids(getattr(holder, "eos_token_id", None)))
    return list(dict.fromkeys(found))


def _ids(given: int | Iterable[int] | None) -> list[int]:
    if given is None:
        return []
    listed = [given] if not isinstance(given, (Iterable, Tensor)) else list(given)
    return [int(token) for token in listed if token is not None and int(token) >= 0]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the special and added tokens of a tokenizer, by their text."""
    added = getattr(tokenizer, "get_added_vocab", None)
    found = dict(added()) if callable(added) else {}
    for text in getattr(tokenizer, "all_special_tokens", ()):
        found[text] = tokenizer.convert_tokens_to_ids(text)
    return found
