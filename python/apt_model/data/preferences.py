"""Preference pairs of files: read, made into tokens, and put into batches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chat import ChatRenderer
from .conversations import (
    OF_TEMPLATE,
    Messages,
    preference_of,
    shared_length,
    template_arguments,
)  # fmt: skip
from .encoding import Encoded, TextEncoder
from .files import TRAINING, read_rows
from .lengths import LengthLimit, cut_prompt
from .rows import BadRow, NotAnObject, RowReport, names_of, renamed, to_stderr, unused_columns

FIELDS = ("prompt", "chosen", "rejected")
TRUNCATIONS = ("prompt-start", "prompt-end", "answer", "drop")


class TooLong(BadRow):
    """A row that is longer than the limit, where such rows are to be dropped."""


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one pair: both answers to one prompt.

    Attributes:
        prompt: the ids that both sides begin with.
        chosen: the ids behind them.
        rejected: the ids behind them.
        counted: which tokens of `prompt + chosen` and of `prompt + rejected` count; None: all of
            the answers.
        removed: how many tokens were cut.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    counted: tuple[tuple[bool, ...], tuple[bool, ...]] | None = None
    removed: int = field(default=0, compare=False)


class PairTokenizer:
    """Makes token ids of prompts and answers, as the tokenizer and its chat template write them.

    Lists of messages are written by the chat template, from the first token to the last. A string
    is taken as it is, unless `chat_template` is set: then a prompt is what a user says and an
    answer is what the assistant says. What fits is not cut.

    Args:
        tokenizer: of Hugging Face; it stays as it is.
        max_length: prompt and answer together have at most this many tokens.
        max_prompt_length: a prompt has at most this many tokens; None: no limit of its own, but
            of a row that does not fit a prompt keeps half of `max_length` before answers are cut.
        chat_template: strings are messages too.
        truncate: what is cut of a longer row: the prompt's start or its end (BOS and the headers
            of the chat stay) and, where the prompt is used up, the answer's end; the answer's end
            alone; or nothing: the row is dropped.
        all_turns: all turns of the assistant count, not the last one alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | LengthLimit = 512,
        max_prompt_length: int | None = None,
        chat_template: bool = False,
        truncate: str = "prompt-start",
        all_turns: bool = False,
    ) -> None:
        if truncate not in TRUNCATIONS:
            raise ValueError(
                f"truncate: expected one of {', '.join(TRUNCATIONS)}, got {truncate!r}"
            )
        limit = max_length if isinstance(max_length, LengthLimit) else LengthLimit(max_length)
        if max_prompt_length is not None and not 0 < max_prompt_length < limit.tokens:
            raise ValueError(
                f"max_prompt_length must be in [1, {limit.tokens}), got {max_prompt_length}"
            )
        if limit.tokens < 2:
            raise ValueError(f"max_length must be at least 2, got {limit.tokens}")
        self.encoder = TextEncoder(tokenizer)
        self.renderer = ChatRenderer(self.encoder.tokenizer, all_turns)
        self._limit, self._max_prompt_length = limit, max_prompt_length
        self._chat_template, self._truncate = chat_template, truncate

    def __call__(
        self,
        prompt: str | Messages,
        chosen: str | Messages,
        rejected: str | Messages,
        arguments: Mapping[str, Any] = {},
    ) -> PreferencePair:
        """Returns the tokens of a pair.

        Raises:
            BadRow: nothing is left to prefer, or the template fails.
            TooLong: the row is longer than the limit and is to be dropped.
        """
        sides = [self.encoded(prompt, answer, arguments) for answer in (chosen, rejected)]
        shared = min(side.begin for side in sides)
        shared = min(shared, shared_length(sides[0].ids, sides[1].ids))
        longest = max(len(side.ids) for side in sides)
        kept, room = self._kept(prompt, sides[0].ids[:shared], longest - shared, arguments)
        parts = [_cut(side, shared, kept, room) for side in sides]
        if parts[0].ids == parts[1].ids:
            raise BadRow(f"'chosen' and 'rejected' are the same in their first {room} tokens")
        if not all(any(part.counted[1:]) for part in parts):
            raise BadRow(
                "an answer of one token needs a prompt" if not shared
                else f"no token of an answer is left within {self._limit.tokens} tokens"
            )  # fmt: skip
        chosen_ids, rejected_ids = (part.ids[len(kept) :] for part in parts)
        plain = all(part.counted == _behind(len(kept), len(part.ids)) for part in parts)
        counted = None if plain else (parts[0].counted, parts[1].counted)
        removed = sum(len(side.ids) for side in sides) - sum(len(part.ids) for part in parts)
        return PreferencePair(parts[0].ids[: len(kept)], chosen_ids, rejected_ids, counted, removed)

    def encoded(
        self,
        prompt: str | Messages,
        answer: str | Messages,
        arguments: Mapping[str, Any] = {},
        finished: bool = True,
    ) -> Encoded:
        """Returns the tokens of a prompt and an answer, whole.

        Args:
            prompt: a text or messages.
            answer: a text or messages.
            arguments: for the chat template.
            finished: False: the answer was cut, and no end is written behind it.
        """
        if isinstance(prompt, str) and isinstance(answer, str) and not self._chat_template:
            return self.encoder.whole(prompt, answer, finished)
        asked, answered = self.messages(prompt), self.messages(answer, "assistant")
        rendered = self.renderer.whole(asked, answered, arguments)
        if not finished:
            words = answered[-1]["content"].rstrip()
            end = rendered.text.rfind(words, rendered.prompt_end) + len(words)
            rendered = rendered._replace(
                text=rendered.text[:end],
                spans=tuple((a, min(b, end)) for a, b in rendered.spans),
            )
        return self.encoder.rendered(*rendered)

    def messages(self, content: str | Messages, role: str = "user") -> Messages:
        """Returns messages as they are, and a string as one message."""
        return [{"role": role, "content": content}] if isinstance(content, str) else content

    def prompt_ids(
        self,
        prompt: str | Messages,
        arguments: Mapping[str, Any] = {},
    ) -> list[int]:
        """Returns the tokens of a prompt, whole."""
        if isinstance(prompt, str) and not self._chat_template:
            return self.encoder.prompt(prompt)
        return self.encoder.plain(self.renderer.prompt(self.messages(prompt), arguments).text)

    def cut_prompt_ids(
        self,
        prompt: str | Messages,
        most: int,
        arguments: Mapping[str, Any] = {},
    ) -> tuple[list[int], int]:
        """Returns the tokens of a prompt, at most so many, and how many were cut.

        Raises:
            TooLong: it is longer, and prompts are not to be cut.
        """
        ids = self.prompt_ids(prompt, arguments)
        if len(ids) <= most:
            return ids, 0
        if self._truncate not in TRUNCATIONS[:2]:
            raise TooLong(f"'prompt' has {len(ids)} tokens, at most {most} leave room")
        kept = self._kept_prompt(prompt, ids, most, arguments)
        return [ids[n] for n in kept], len(ids) - len(kept)

    def sequence(
        self,
        prompt: str | Messages,
        answer: str,
        arguments: Mapping[str, Any] = {},
        finished: bool = True,
    ) -> list[int]:
        """Returns the tokens of prompt and answer, cut to the limit as the tokens of a pair are.

        Where rows are to be dropped, the answer's end is cut: what was sampled is scored.
        """
        side = self.encoded(prompt, answer, arguments, finished)
        room = len(side.ids) - side.begin
        if self._truncate == "drop":
            kept, room = list(range(side.begin)), max(self._limit.tokens - side.begin, 0)
        else:
            kept, room = self._kept(prompt, side.ids[: side.begin], room, arguments)
        return list(_cut(side, side.begin, kept, room).ids)[: self._limit.tokens]

    def _kept(
        self,
        prompt: str | Messages,
        ids: Sequence[int],
        answer: int,
        arguments: Mapping[str, Any],
    ) -> tuple[list[int], int]:
        """Returns which tokens of the prompt are kept, and the room for the answers."""
        limit = self._limit.tokens
        most = len(ids) if self._max_prompt_length is None else self._max_prompt_length
        if len(ids) <= most and len(ids) + answer <= limit:
            return list(range(len(ids))), answer
        self._limit.check(len(ids) + answer)
        if self._truncate == "drop":
            raise TooLong(f"has {len(ids) + answer} tokens, more than {limit}")
        kept = list(range(len(ids)))
        if self._truncate != "answer" or len(ids) > most:
            if self._truncate != "answer":
                half = min(most, limit // 2)  # of a prompt that much is kept
                most = min(most, max(limit - answer, half))
            kept = self._kept_prompt(prompt, ids, most, arguments)
        room = limit - len(kept)
        if room < 1:
            raise BadRow(
                f"the prompt has {len(kept)} tokens that are not cut: no room for an answer "
                f"within {limit} tokens"
            )
        return kept, min(answer, room)

    def _kept_prompt(
        self, prompt: str | Messages, ids: Sequence[int], most: int, arguments: Mapping[str, Any]
    ) -> list[int]:
        head, tail = self._around(prompt, ids, arguments)
        side = "prompt-end" if self._truncate == "prompt-end" else "prompt-start"
        return cut_prompt(len(ids), head, tail, most, side)

    def _around(
        self, prompt: str | Messages, ids: Sequence[int], arguments: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Returns how many first and last tokens of a prompt are not cut."""
        if isinstance(prompt, str) and not self._chat_template:
            lead = self.encoder.lead
            led = bool(lead) and list(ids[: len(lead)]) == lead
            begun = bool(ids) and ids[0] == getattr(self.encoder.tokenizer, "bos_token_id", None)
            return len(lead) if led else int(begun), 0
        messages = self.messages(prompt)
        text = self.renderer.prompt(messages, arguments).text
        begin, end = self.renderer.cuttable(text, messages, arguments)
        places = [self.encoder.begin_of(text, place) for place in (begin, end)]
        return places[0], max(len(ids) - places[1], 0)


def _behind(begin: int, length: int) -> tuple[bool, ...]:
    return tuple(n >= begin for n in range(length))


def _cut(side: Encoded, shared: int, kept: Sequence[int], room: int) -> Encoded:
    """Returns the kept tokens of a shared prompt, and the first tokens behind it."""
    numbers = [*kept, *range(shared, min(shared + room, len(side.ids)))]
    return Encoded(
        tuple(side.ids[n] for n in numbers), len(kept), tuple(side.counted[n] for n in numbers)
    )


def load_pairs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenize: PairTokenizer,
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = to_stderr,
    columns: Mapping[str, str] = {},
    splits: tuple[str, ...] = TRAINING,
    counts: Counter[str] | None = None,
) -> list[PreferencePair]:
    """Returns the pairs of files: rows of `chosen`, `rejected` and, mostly, `prompt`.

    Args:
        paths: see `read_rows`.
        tokenize: makes tokens of a row.
        fail_on_bad_row: see `load_rows`.
        report: see `load_rows`.
        columns: see `load_rows`.
        splits: see `read_rows`.
        counts: see `load_rows`.

    Raises:
        BadRow: see `load_rows`.
    """

    def use(row: Mapping[str, Any], told: RowReport) -> PreferencePair:
        given = preference_of(row)
        arguments = template_arguments(row)
        pair = tokenize(*given, arguments)
        if not isinstance(given.prompt, str):
            tell_left_out(tokenize, given.prompt, arguments, told)
        return pair

    return load_rows(
        paths, use, (*FIELDS, *OF_TEMPLATE), fail_on_bad_row=fail_on_bad_row, report=report,
        columns=columns, splits=splits, counts=counts, wanted=", ".join(FIELDS),
    )  # fmt: skip


def tell_left_out(
    tokenize: PairTokenizer, prompt: Messages, arguments: Mapping[str, Any], told: RowReport
) -> None:
    """Reports once where the chat template leaves out a message."""
    text = tokenize.renderer.prompt(prompt, arguments).text
    role = tokenize.renderer.left_out(text, prompt)
    if role is not None:
        told.counts["rows_with_a_message_left_out"] += 1
        told.once("left out", f"the chat template leaves out messages of the {role}")


def load_rows(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    use: Callable[[Mapping[str, Any], RowReport], Any],
    fields: Sequence[str] | None,
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = to_stderr,
    columns: Mapping[str, str] = {},
    splits: tuple[str, ...] = TRAINING,
    counts: Counter[str] | None = None,
    lines_are_rows: bool = False,
    wanted: str = "a 'text'",
) -> list[Any]:
    """Returns what `use` makes of the rows of files.

    Args:
        paths: see `read_rows`.
        use: makes something of a row; a `BadRow` it raises is given the row's place.
        fields: the columns that are read, others are named once; None: all of them are.
        fail_on_bad_row: True: the first row that cannot be used raises `BadRow`; False: such rows
            are left out, and `report` is told the place and the reason.
        report: called with one message a row.
        columns: for a column that is read its name in the files, where it is another.
        splits: see `read_rows`.
        counts: where rows are counted that were skipped, cut or dropped.
        lines_are_rows: lines of text are rows with the column `text`.
        wanted: names the columns of a row, for messages.

    Raises:
        BadRow: see `fail_on_bad_row`; also where no row is left.
    """
    told = RowReport(fail_on_bad_row, report, counts)
    used, seen = [], set()
    for place, value in read_rows(paths, lines_are_rows=lines_are_rows, splits=splits):
        try:
            if isinstance(value, NotAnObject):
                raise BadRow(f"must be an object with {wanted}, got {value}")
            if isinstance(value, BadRow):
                raise value
            if isinstance(value, str):
                if not value.strip():
                    continue
                value = {"text": value}
            if fields is not None:
                seen |= dict.fromkeys(value).keys() - columns.values()
            told.place = place
            made = use(renamed(value, columns), told)
        except TooLong as error:
            told.tell("rows dropped", f"{place}: {error} (row dropped)")
        except BadRow as error:
            told.skip(place, error)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        else:
            if removed := getattr(made, "removed", 0):
                told.tell("rows cut", f"{place}: {removed} tokens are cut")
                told.counts["tokens_cut"] += removed
            used.append(made)
    message = unused_columns(sorted(seen), fields) if fields is not None else ""
    if message:
        report(f"{names_of(paths)}: {message}")
    told.end(names_of(paths))
    if not used:
        raise BadRow(f"{names_of(paths)}: no row can be used")
    return used


def collate(pairs: Sequence[PreferencePair]) -> dict[str, Tensor]:
    """Returns the arguments of `DPOTrainer.train_step`, padded on the right.

    Which tokens count is `prompt_lengths` where all tokens of all answers do, else two masks.
    """
    batch: dict[str, Tensor] = {}
    if all(pair.counted is None for pair in pairs):
        batch["prompt_lengths"] = torch.tensor([len(pair.prompt) for pair in pairs])
    for number, side in enumerate(("chosen", "rejected")):
        rows = [torch.tensor(pair.prompt + getattr(pair, side)) for pair in pairs]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        batch[f"{side}_ids"] = ids
        batch[f"{side}_mask"] = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        if "prompt_lengths" not in batch:
            counted = [
                torch.tensor(
                    pair.counted[number] if pair.counted else _behind(len(pair.prompt), len(row))
                )
                for pair, row in zip(pairs, rows, strict=True)
            ]
            batch[f"{side}_response_mask"] = torch.nn.utils.rnn.pad_sequence(
                counted, batch_first=True
            ).long()
    return batch
