"""Preference pairs from JSON lines: read, tokenized, and put into batches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIELDS = ("prompt", "chosen", "rejected")
REPORTED_ROWS = 20


class BadRow(ValueError):
    """A row that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one pair: both answers to one prompt."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def read_rows(
    path: str | os.PathLike[str], fields: Sequence[str] = FIELDS
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields each line's number and its row, or the `BadRow` that says what is wrong with it."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, _checked_row(line, fields)
                except BadRow as error:
                    yield number, BadRow(f"{os.fspath(path)}:{number}: {error}")


def _checked_row(line: bytes, fields: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"must be an object with {', '.join(fields)}, got {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise BadRow(f"has no {field!r}")
        if not isinstance(row[field], str):
            raise BadRow(f"{field!r} must be a string, got {type(row[field]).__name__}")
    for field in fields[1:]:
        if not row[field].strip():
            raise BadRow(f"{field!r} is empty")
    if row.get("chosen", 0) == row.get("rejected", 1):
        raise BadRow("'chosen' and 'rejected' are the same")
    return row


class PairTokenizer:
    """Makes `PreferencePair`s of texts.

    Args:
        tokenizer: of Hugging Face.
        max_length: prompt and answer together are cut to this many tokens, the answer at its end.
        max_prompt_length: the prompt is cut to its last so many tokens; None: half of `max_length`.
        chat_template: the prompt is what a user says, in the tokenizer's chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        chat_template: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_prompt_length = (
            max_length // 2 if max_prompt_length is None else max_prompt_length
        )
        self._chat_template = chat_template
        if not 0 < self._max_prompt_length < max_length:
            raise ValueError(
                f"max_prompt_length must be in [1, {max_length}), got {self._max_prompt_length}"
            )

    def __call__(self, prompt: str, chosen: str, rejected: str) -> PreferencePair:
        """Returns the tokens; raises `BadRow` where nothing is left to prefer."""
        ids = self.prompt_ids(prompt)[-self._max_prompt_length :]
        room = self._max_length - len(ids)
        answers = [self._answer_ids(text)[:room] for text in (chosen, rejected)]
        if answers[0] == answers[1]:
            raise BadRow(f"'chosen' and 'rejected' are the same in their first {room} tokens")
        if not ids and min(map(len, answers)) < 2:
            raise BadRow("an answer of one token needs a prompt")
        return PreferencePair(tuple(ids), *map(tuple, answers))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt, whole."""
        if self._chat_template:
            prompt = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = self._tokenizer(prompt, add_special_tokens=not self._chat_template)["input_ids"]
        ended = bool(ids) and ids[-1] == self._tokenizer.eos_token_id and not self._chat_template
        return ids[:-1] if ended else ids

    def sequence(self, prompt: str, answer: str) -> list[int]:
        """Returns the tokens of prompt and answer, cut as those of a pair."""
        ids = self.prompt_ids(prompt)[-self._max_prompt_length :]
        return [*ids, *self._answer_ids(answer)][: self._max_length]

    def _answer_ids(self, answer: str) -> list[int]:
        end = self._tokenizer.eos_token_id
        ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        return ids if end is None else [*ids, end]


def load_pairs(
    path: str | os.PathLike[str],
    tokenize: PairTokenizer,
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = lambda message: print(message, file=sys.stderr),
) -> list[PreferencePair]:
    """Returns the pairs of a file of JSON lines: `load_rows` of prompt, chosen and rejected."""

    def use(row: dict[str, Any]) -> PreferencePair:
        return tokenize(*(row[field] for field in FIELDS))

    return load_rows(path, use, FIELDS, fail_on_bad_row=fail_on_bad_row, report=report)


def load_rows(
    path: str | os.PathLike[str],
    use: Callable[[dict[str, Any]], Any],
    fields: Sequence[str],
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = lambda message: print(message, file=sys.stderr),
) -> list[Any]:
    """Returns what `use` makes of the rows of a file of JSON lines.

    Args:
        path: rows that hold `fields`, all strings, not empty but for the first.
        use: makes something of a row; a `BadRow` it raises is given the line's number.
        fields: what each row must hold; it may hold others.
        fail_on_bad_row: True: the first row that cannot be used raises `BadRow`; False: such rows
            are left out, and `report` is told the line and the reason.
        report: called with one message a row.

    Raises:
        BadRow: see `fail_on_bad_row`; also where no row is left.
    """
    used, skipped = [], 0
    for number, row in read_rows(path, fields):
        try:
            if isinstance(row, BadRow):
                raise row
            try:
                used.append(use(row))
            except BadRow as error:
                raise BadRow(f"{os.fspath(path)}:{number}: {error}") from None
        except BadRow as error:
            if fail_on_bad_row:
                raise
            skipped += 1
            if skipped <= REPORTED_ROWS:
                report(f"{error} (row skipped)")
    if skipped > REPORTED_ROWS:
        report(f"{os.fspath(path)}: {skipped - REPORTED_ROWS} more rows skipped")
    if not used:
        raise BadRow(f"{os.fspath(path)}: no row can be used")
    return used


def collate(pairs: Sequence[PreferencePair]) -> dict[str, Tensor]:
    """Returns the arguments of `DPOTrainer.train_step`, padded on the right."""
    batch = {"prompt_lengths": torch.tensor([len(pair.prompt) for pair in pairs])}
    for side in ("chosen", "rejected"):
        rows = [torch.tensor(pair.prompt + getattr(pair, side)) for pair in pairs]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        batch[f"{side}_ids"] = ids
        batch[f"{side}_mask"] = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    return batch
