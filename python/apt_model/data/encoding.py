"""Token ids of texts, as a tokenizer writes the whole of a text, and where an answer is in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .conversations import shared_length

PROBE = "a"
UNLIMITED = 10**30


class Encoded(NamedTuple):
    """Token ids, and which of them count.

    Attributes:
        ids: all tokens.
        begin: how many tokens stand before the answer.
        counted: which tokens count, one a token.
    """

    ids: tuple[int, ...]
    begin: int
    counted: tuple[bool, ...]


def working_copy(tokenizer: Any) -> Any:
    """Returns a copy of a tokenizer that neither cuts nor pads; the given one stays as it came."""
    copied = copy.deepcopy(tokenizer)
    if getattr(copied, "is_fast", False):
        copied.backend_tokenizer.no_truncation()
        copied.backend_tokenizer.no_padding()
    copied.model_max_length = UNLIMITED  # lengths are looked after here, without its warnings
    return copied


class TextEncoder:
    """Makes token ids of whole texts: a token never depends on where a prompt ends.

    Args:
        tokenizer: of Hugging Face.

    Attributes:
        lead: the ids that the tokenizer writes before a text, such as BOS.
        trail: the ids that it writes behind a text, such as [SEP].
        end: the ids that end an answer: the end token, or else `trail`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = working_copy(tokenizer)
        self.lead, self.trail = self._around()
        end = getattr(self.tokenizer, "eos_token_id", None)
        self.end = self.trail if end is None else [end]
        self._unknown = getattr(self.tokenizer, "unk_token_id", None)
        self._enders = self._ending_ids()

    def plain(self, text: str) -> list[int]:
        """Returns the ids of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt: what the tokenizer writes before it, once, and its own."""
        return self._led(self.plain(text))

    def whole(self, prompt: str, answer: str, finished: bool = True) -> Encoded:
        """Returns the ids of a prompt and its answer as one text.

        Args:
            prompt: a text, which may have been written by a template before.
            answer: a text; it goes on where the prompt ends.
            finished: write the end token behind an answer that has none yet.
        """
        ids, begin = self._joined(prompt, answer)
        led = self._led(ids)
        begin += len(led) - len(ids)
        if finished and not self._is_ended(answer):
            led = [*led, *self.end]
        return Encoded(tuple(led), begin, tuple(n >= begin for n in range(len(led))))

    def rendered(self, text: str, prompt_end: int, spans: Sequence[tuple[int, int]]) -> Encoded:
        """Returns the ids of a text that a chat template wrote, of which the spans count."""
        ids, behind = self._placed(text)
        counted = [False] * len(ids)
        for first, last in spans:
            stop = behind(last) if last < len(text) else len(ids)
            counted[behind(first) : stop] = [True] * (stop - behind(first))
        return Encoded(tuple(ids), behind(prompt_end), tuple(counted))

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text alone, and where in it each token begins and ends."""
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]), made["offset_mapping"]

    def begin_of(self, text: str, place: int) -> int:
        """Returns how many tokens of a text end before or at a character."""
        return self._placed(text)[1](place)

    def wrapped(self, ids: Sequence[int]) -> list[int]:
        """Returns ids between what the tokenizer writes before and behind a text, each once."""
        led = self._led(list(ids))
        ended = not self.trail or led[-len(self.trail) :] == self.trail
        return led if ended and len(led) > len(self.lead) else [*led, *self.trail]

    def _joined(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Returns the ids of prompt and answer as one text, and how many are of the prompt."""
        text = prompt + answer
        ids, behind = self._placed(text)
        begin = behind(len(prompt))
        if begin < len(ids) and ids[begin] == self._unknown:
            # Two words of a tokenizer without spaces may have become one that it does not know
            apart = [self.plain(prompt), self.plain(answer)]
            if sum(part.count(self._unknown) for part in apart) < ids.count(self._unknown):
                return [*apart[0], *apart[1]], len(apart[0])
        return ids, begin

    def _placed(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        """Returns the ids of a text, and a function of a character's place.

        The function returns the number of the first token that ends behind the place. A tokenizer
        that tells no offsets is asked for the ids of the text before the place.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self.plain(text)
            return ids, lambda place: shared_length(self.plain(text[:place]), ids)
        ids, offsets = self.with_offsets(text)
        ends = [end for _, end in offsets]

        def behind(place: int) -> int:
            return next((n for n, end in enumerate(ends) if end > place), len(ends))

        return ids, behind

    def _led(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.lead)] == self.lead else [*self.lead, *ids]

    def _is_ended(self, answer: str) -> bool:
        """Returns whether the last token of an answer is one that ends texts."""
        if not self._enders:
            return False
        ids = self.plain(answer.rstrip())
        return bool(ids) and ids[-1] in self._enders

    def _around(self) -> tuple[list[int], list[int]]:
        """Returns what the tokenizer writes before and behind a text."""
        bare = self.plain(PROBE)
        full = list(self.tokenizer(PROBE, add_special_tokens=True)["input_ids"])
        for place in range(len(full) - len(bare) + 1):
            if bare and full[place : place + len(bare)] == bare:
                return full[:place], full[place + len(bare) :]
        return [], []

    def _ending_ids(self) -> set[int]:
        """Returns the ids that end an answer: control tokens that a text can end with."""
        tokenizer = self.tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids = {number for number, token in added.items() if getattr(token, "special", False)}
        ids |= {*self.end, *self.trail}
        names = ("unk_token_id", "pad_token_id", "bos_token_id", "mask_token_id", "cls_token_id")
        beginning = {getattr(tokenizer, name, None) for name in names} - {*self.end, *self.trail}
        return ids - beginning
