"""Texts from lines or JSON lines: read, tokenized, and put into batches."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..training.files import generator_of
from .augmentation import TextAugmentation
from .preferences import REPORTED_ROWS, BadRow
from .sentence_pairs import NSPDataBuilder

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Text(NamedTuple):
    """One row: a text, and another one of the same meaning where it has one."""

    text: str
    positive: str | None = None


def load_texts(
    path: str | os.PathLike[str],
    *,
    fail_on_bad_row: bool = False,
    usable: Callable[[Text], str | None] = lambda text: None,
    report: Callable[[str], Any] = lambda message: print(message, file=sys.stderr),
) -> list[Text]:
    """Returns the texts of a file: one a line, or of JSON lines (`.jsonl`, `.json`).

    Args:
        path: of lines; or of objects with a string `text`, and a `positive` where there is one.
        fail_on_bad_row: True: the first row that cannot be used raises `BadRow`; False: such rows
            are left out, and `report` is told the line and the reason. Empty lines are no rows.
        usable: returns why a row cannot be used, or None.
        report: called with one message a row.

    Raises:
        BadRow: see `fail_on_bad_row`; also where no row is left.
    """
    as_json = Path(path).suffix in (".jsonl", ".json")
    texts, skipped = [], 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _row(line, as_json)
                reason = usable(row)
                if reason:
                    raise BadRow(reason)
                texts.append(row)
            except BadRow as error:
                error = BadRow(f"{os.fspath(path)}:{number}: {error}")
                if fail_on_bad_row:
                    raise error from None
                skipped += 1
                if skipped <= REPORTED_ROWS:
                    report(f"{error} (row skipped)")
    if skipped > REPORTED_ROWS:
        report(f"{os.fspath(path)}: {skipped - REPORTED_ROWS} more rows skipped")
    if not texts:
        raise BadRow(f"{os.fspath(path)}: no row can be used")
    return texts


def _row(line: bytes, as_json: bool) -> Text:
    try:
        if not as_json:
            return Text(" ".join(line.decode().split()))
        row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        raise BadRow(f"not {'JSON' if as_json else 'UTF-8'}: {error}") from None
    if not isinstance(row, dict) or "text" not in row:
        raise BadRow("must be an object with a 'text'")
    for field in ("text", "positive"):
        value = row.get(field, "-")
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"{field!r} must be a string that is not empty, got {value!r}")
    return Text(row["text"], row.get("positive"))


def segments(text: str, sentences: int) -> list[str]:
    """Returns the text in pieces of so many sentences; a shorter rest is left out."""
    parts = [part for part in SENTENCE_END.split(" ".join(text.split())) if part]
    return [
        " ".join(parts[start : start + sentences])
        for start in range(0, len(parts) - sentences + 1, sentences)
    ]


class MaskedTexts:
    """The batches of masked-language modelling.

    Args:
        texts: one sequence each.
        tokenizer: of Hugging Face, a fast one.
        max_length: tokens a text; cut beyond.
        whole_word: mask words, not tokens.
    """

    def __init__(
        self, texts: Sequence[Text], tokenizer: Any, max_length: int, whole_word: bool = False
    ) -> None:
        encoded = tokenizer(
            [row.text for row in texts], truncation=True, max_length=max_length, padding=False
        )
        self._ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self._words = None
        if whole_word:
            self._words = [
                torch.tensor([-1 if word is None else word for word in encoded.word_ids(row)])
                for row in range(len(texts))
            ]
        self._pad = tokenizer.pad_token_id or 0

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `MLMPretrainer.train_step`, keyed by the texts' numbers."""
        ids, mask = padded([self._ids[row] for row in rows], self._pad)
        batch = {"input_ids": ids, "attention_mask": mask, "sample_ids": torch.tensor(rows)}
        if self._words is not None:
            batch["word_ids"], _ = padded([self._words[row] for row in rows], -1)
        return batch


class SentencePairs:
    """The batches of masked-language modelling with next-sentence prediction.

    Args:
        documents: the segments of each text, two or more.
        tokenizer: of Hugging Face.
        max_length: tokens of a pair.
        seed: of the second segments, drawn anew every epoch.
        negative_ratio: share of the pairs whose second segment is a random one.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[str]],
        tokenizer: Any,
        max_length: int,
        seed: int,
        negative_ratio: float = 0.5,
    ) -> None:
        self._arguments = (documents, tokenizer, max_length, negative_ratio)
        self._seed = seed
        self._epoch, self._pairs = -1, None
        self._count = sum(len(document) - 1 for document in documents)
        self.per_epoch = 1  # steps; whoever makes the batches sets it

    def __len__(self) -> int:
        return self._count

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `MLMPretrainer.train_step`."""
        epoch = step // self.per_epoch
        if epoch != self._epoch:
            generator = generator_of("pairs", self._seed, epoch)
            self._pairs = NSPDataBuilder.create_nsp_pairs(*self._arguments, generator=generator)
            self._epoch = epoch
        ids, mask, labels = (tensor[rows] for tensor in self._pairs)
        width = int(mask.sum(1).max())
        return {
            "input_ids": ids[:, :width],
            "attention_mask": mask[:, :width],
            "nsp_labels": labels,
            "sample_ids": torch.tensor(rows),
        }


class TextViews:
    """The batches of contrastive learning: two changed forms of a text, or a text and its positive.

    Args:
        texts: one sample each.
        tokenizer: of Hugging Face.
        max_length: tokens a text; cut beyond.
        seed: of the changes.
        mask_prob: of `TextAugmentation.random_mask`.
        delete_prob: of `TextAugmentation.random_delete`.
        swap_prob: of `TextAugmentation.random_swap`.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        max_length: int,
        seed: int = 0,
        mask_prob: float = 0.0,
        delete_prob: float = 0.0,
        swap_prob: float = 0.0,
    ) -> None:
        def encode(strings: list[str]) -> list[Tensor]:
            encoded = tokenizer(strings, truncation=True, max_length=max_length, padding=False)
            return [torch.tensor(ids) for ids in encoded["input_ids"]]

        self._sides = [encode([row.text for row in texts])]
        self._sides.append(encode([row.positive or row.text for row in texts]))
        self._tokenizer, self._seed = tokenizer, seed
        self._probabilities = (mask_prob, delete_prob, swap_prob)

    def __len__(self) -> int:
        return len(self._sides[0])

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `ContrastivePretrainer.train_step`."""
        batch = {}
        pad = self._tokenizer.pad_token_id or 0
        mask_prob, delete_prob, swap_prob = self._probabilities
        generator = generator_of("texts", self._seed, step)
        options = {
            "special_ids": self._tokenizer.all_special_ids,
            "pad_token_id": pad,
            "generator": generator,
        }
        for number, side in enumerate(self._sides, start=1):
            ids, mask = padded([side[row] for row in rows], pad)
            if swap_prob:
                ids = TextAugmentation.random_swap(ids, swap_prob, attention_mask=mask, **options)
            if mask_prob:
                token = self._tokenizer.mask_token_id
                ids = TextAugmentation.random_mask(
                    ids, token, mask_prob, attention_mask=mask, **options
                )
            if delete_prob:
                ids, mask = TextAugmentation.random_delete(
                    ids, delete_prob, attention_mask=mask, **options
                )
            batch[f"input_ids_{number}"], batch[f"attention_mask_{number}"] = ids, mask
        return batch


def padded(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Returns the rows padded on the right, `(B, S)`, and the mask of what is real."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
