"""Texts of files: read, made into tokens of a length that fits, and put into batches."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .augmentation import TextAugmentation
from .conversations import content_of
from .duplicates import groups_of
from .encoding import TextEncoder, working_copy
from .files import TRAINING, read_rows
from .lengths import LengthLimit, windows
from .order import generator_of
from .preferences import load_rows
from .rows import (
    BadRow,
    NotAnObject,
    Row,
    RowReport,
    is_absent,
    names_of,
    renamed,
    text_of,
    to_stderr,
)
from .sentence_pairs import SPECIALS, NSPDataBuilder
from .sentences import documents, split_sentences
from .words import check_tells_words, token_words

OF_TEXTS = ("text", "messages", "prompt", "completion")
OF_PAIRS = ("text", "positive", "negative")
LONG_TEXTS = ("window", "pack", "cut")


class Text(NamedTuple):
    """One row.

    Attributes:
        text: a text.
        positive: another text of the same meaning, or None.
        negative: a text of another meaning that looks alike, or None.
    """

    text: str
    positive: str | None = None
    negative: str | None = None


def load_texts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    pairs: bool = True,
    fail_on_bad_row: bool = False,
    usable: Callable[[Text], str | None] = lambda text: None,
    report: Callable[[str], Any] = to_stderr,
    columns: Mapping[str, str] = {},
    splits: tuple[str, ...] = TRAINING,
    counts: Counter[str] | None = None,
) -> list[Text]:
    """Returns the texts of files: a text a line, or rows of columns.

    Args:
        paths: see `read_rows`; lines of text, or rows with a string `text` (also `messages`, or
            `prompt` and `completion`, which become one text).
        pairs: rows may hold a `positive` and a `negative` too.
        fail_on_bad_row: see `load_rows`.
        usable: returns why a text cannot be used, or None.
        report: see `load_rows`.
        columns: see `load_rows`.
        splits: see `read_rows`.
        counts: see `load_rows`.

    Raises:
        BadRow: see `load_rows`.
    """

    def use(row: Mapping[str, Any], told: RowReport) -> Text:
        others = [
            text_of(row, name) if pairs and not is_absent(row.get(name)) else None
            for name in OF_PAIRS[1:]
        ]
        text = Text(_text_of_row(row), *others)
        if reason := usable(text):
            raise BadRow(reason)
        return text

    return load_rows(
        paths, use, (*OF_TEXTS, *OF_PAIRS) if pairs else OF_TEXTS, report=report,
        fail_on_bad_row=fail_on_bad_row, columns=columns, splits=splits, counts=counts,
        lines_are_rows=True,
    )  # fmt: skip


def _text_of_row(row: Mapping[str, Any]) -> str:
    if is_absent(row.get("text")) and not is_absent(row.get("messages")):
        messages = content_of(row, "messages")
        if isinstance(messages, str):
            return messages
        return "\n".join(message["content"] for message in messages if message["content"])
    if is_absent(row.get("text")) and not is_absent(row.get("completion")):
        return "".join(
            part if isinstance(part, str) else "\n".join(m["content"] for m in part)
            for name in ("prompt", "completion")
            if not is_absent(row.get(name))
            for part in [content_of(row, name, may_be_empty=True)]
        )
    return (
        text_of(row, "text")
        if "\n" in str(row.get("text"))
        else " ".join(text_of(row, "text").split())
    )


def load_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = to_stderr,
    columns: Mapping[str, str] = {},
    splits: tuple[str, ...] = TRAINING,
    counts: Counter[str] | None = None,
) -> list[list[str]]:
    """Returns the documents of files, each as two sentences or more.

    Args:
        paths: see `read_rows`; a row is a document. Of lines of text see `documents`.
        fail_on_bad_row: see `load_rows`; a document of one sentence is such a row.
        report: see `load_rows`.
        columns: see `load_rows`.
        splits: see `read_rows`.
        counts: see `load_rows`.

    Raises:
        BadRow: see `load_rows`.
    """
    told = RowReport(fail_on_bad_row, report, counts)
    found: list[list[str]] = []
    paragraphs: list[list[Row]] = [[]]

    def use(place: str, sentences: list[str]) -> None:
        if len(sentences) < 2:
            told.skip(place, "has no two segments: no sentence follows another")
        else:
            found.append(sentences)

    def use_lines() -> None:
        blocks = [block for block in paragraphs if block]
        made = documents([[row.value for row in block] for block in blocks])
        lines_are_documents = len(blocks) == 1 and len(made) > 1
        for number, (block, sentences) in enumerate(made):
            use(blocks[block][number if lines_are_documents else 0].place, sentences)
        paragraphs[:] = [[]]

    file = ""
    for row in read_rows(paths, lines_are_rows=True, splits=splits):
        name = row.place.rpartition(":")[0]
        if name != file:
            use_lines()
            file = name
        if isinstance(row.value, NotAnObject):
            told.skip(row.place, f"must be an object with a 'text', got {row.value}")
        elif isinstance(row.value, BadRow):
            told.skip(row.place, row.value)
        elif not isinstance(row.value, str):
            try:
                use(row.place, _sentences_of_row(renamed(row.value, columns)))
            except BadRow as error:
                told.skip(row.place, error)
        elif row.value.strip():
            paragraphs[-1].append(row)
        elif paragraphs[-1]:
            paragraphs.append([])
    use_lines()
    told.end(names_of(paths))
    if not found:
        raise BadRow(f"{names_of(paths)}: no row can be used")
    return found


def _sentences_of_row(row: Mapping[str, Any]) -> list[str]:
    text = _text_of_row(row)
    sentences = split_sentences(text)
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    return lines if len(sentences) < 2 else sentences


def only_special(tokenizer: Any) -> Callable[[Text], str | None]:
    """Returns the `usable` of `load_texts` that refuses texts of which nothing can be learned."""
    encoder, special = TextEncoder(tokenizer), set(tokenizer.all_special_ids)

    def reason(text: Text) -> str | None:
        for part in text:
            if part is not None and special.issuperset(encoder.plain(part)):
                return "has no tokens but special ones"
        return None

    return reason


class MaskedTexts:
    """The batches of masked-language modelling.

    Args:
        texts: one sequence each, or several, or a part of one: see `long_texts`.
        tokenizer: of Hugging Face; it stays as it is.
        max_length: tokens of a sequence, with the special ones.
        whole_word: mask words, not tokens.
        long_texts: a longer text becomes windows of nearly one length ("window"), all texts become
            one and are cut into full windows ("pack"), or its end is cut ("cut").
        counts: where texts and tokens are counted that were cut, and the sequences.

    Raises:
        ValueError: the tokenizer does not tell words, or `max_length` leaves no room.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        max_length: int | LengthLimit,
        whole_word: bool = False,
        long_texts: str = "window",
        counts: Counter[str] | None = None,
    ) -> None:
        if long_texts not in LONG_TEXTS:
            raise ValueError(
                f"long_texts: expected one of {', '.join(LONG_TEXTS)}, got {long_texts!r}"
            )
        if whole_word:
            check_tells_words(tokenizer)
        limit = max_length if isinstance(max_length, LengthLimit) else LengthLimit(max_length)
        self._encoder = TextEncoder(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._room = limit.tokens - len(self._encoder.lead) - len(self._encoder.trail)
        self._counts = Counter() if counts is None else counts
        if self._room < 1:
            raise ValueError(
                f"--max-length {limit.tokens} leaves no room for text beside the special tokens"
            )
        made = [self._encoded(row.text, whole_word) for row in texts]
        for ids, _ in made:
            limit.check(len(self._encoder.wrapped(ids)))
        sequences = [
            self._wrapped(ids[a:b], None if words is None else words[a:b])
            for ids, words in (self._packed(made) if long_texts == "pack" else made)
            for a, b in self._windows(ids, words, long_texts)
        ]
        self._ids = [torch.tensor(ids) for ids, _ in sequences]
        self._words = [torch.tensor(words) for _, words in sequences] if whole_word else None
        self._pad = tokenizer.pad_token_id or 0
        self._counts["sequences"] += len(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `MLMPretrainer.train_step`, keyed by the texts' numbers."""
        ids, mask = padded([self._ids[row] for row in rows], self._pad)
        batch = {"input_ids": ids, "attention_mask": mask, "sample_ids": torch.tensor(rows)}
        if self._words is not None:
            batch["word_ids"], _ = padded([self._words[row] for row in rows], -1)
        return batch

    def _encoded(self, text: str, whole_word: bool) -> tuple[list[int], list[int] | None]:
        if not whole_word:
            return self._encoder.plain(text), None
        ids, offsets = self._encoder.with_offsets(text)
        return ids, token_words(text, offsets)

    def _packed(
        self, made: Sequence[tuple[list[int], list[int] | None]]
    ) -> list[tuple[list[int], list[int] | None]]:
        """Returns all texts as one, parted by what ends a text."""
        between = self._encoder.trail or self._encoder.end
        all_ids: list[int] = []
        all_words: list[int] | None = None if made[0][1] is None else []
        for number, (ids, words) in enumerate(made):
            parted = between if number else []
            if all_words is not None and words is not None:
                first = all_words[-1] + 2 if all_words else 0
                all_words += [first - 1] * len(parted) + [first + word for word in words]
            all_ids += [*parted, *ids]
        return [(all_ids, all_words)]

    def _windows(
        self, ids: list[int], words: list[int] | None, long_texts: str
    ) -> list[tuple[int, int]]:
        if long_texts == "cut" and len(ids) > self._room:
            self._counts["rows_cut"] += 1
            self._counts["tokens_cut"] += len(ids) - self._room
            return [(0, self._room)]
        if long_texts == "pack":
            return [(a, min(a + self._room, len(ids))) for a in range(0, len(ids), self._room)]
        found = windows(len(ids), self._room, words)
        if len(found) > 1:
            self._counts["rows_split"] += 1
        return found

    def _wrapped(self, ids: list[int], words: list[int] | None) -> tuple[list[int], list[int]]:
        """Returns the ids of a sequence, and the words of its tokens: -1 for special ones."""
        made = self._encoder.wrapped(ids)
        if words is None:
            return made, []
        before = len(self._encoder.lead) if len(made) > len(ids) else 0
        before = before if made[before : before + len(ids)] == ids else 0
        numbers = [-1] * before + words + [-1] * (len(made) - len(ids) - before)
        return made, [-1 if i in self._special else w for i, w in zip(made, numbers, strict=True)]


class SentencePairs:
    """The batches of masked-language modelling with next-sentence prediction.

    Args:
        documents: the segments of each text, two or more.
        tokenizer: of Hugging Face; it stays as it is.
        max_length: tokens of a pair; the longer segment is cut at its end.
        seed: of the second segments, drawn anew every epoch.
        negative_ratio: share of the pairs whose second segment is a random one.
        counts: where pairs that follow each other are counted if they are cut.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[str]],
        tokenizer: Any,
        max_length: int | LengthLimit,
        seed: int,
        negative_ratio: float = 0.5,
        counts: Counter[str] | None = None,
    ) -> None:
        limit = max_length if isinstance(max_length, LengthLimit) else LengthLimit(max_length)
        tokenizer = working_copy(tokenizer)
        self._arguments = (documents, tokenizer, limit.tokens, negative_ratio)
        self._seed = seed
        self._epoch = -1
        self._pairs: tuple[Tensor, ...] = ()
        self._count = sum(len(document) - 1 for document in documents)
        self.per_epoch = 1  # steps; whoever makes the batches sets it
        self._count_cut(limit, Counter() if counts is None else counts)

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

    def _count_cut(self, limit: LengthLimit, counts: Counter[str]) -> None:
        documents, tokenizer = self._arguments[:2]
        for document in documents:
            ids = tokenizer(list(document), add_special_tokens=False)["input_ids"]
            lengths = [len(tokens) for tokens in ids]
            for a, b in itertools.pairwise(lengths):
                limit.check(a + b + SPECIALS)
                if a + b + SPECIALS > limit.tokens:
                    counts["rows_cut"] += 1
                    counts["tokens_cut"] += a + b + SPECIALS - limit.tokens
        counts["sequences"] += self._count


class TextViews:
    """The batches of contrastive learning: two changed forms of a text, or a text and its positive.

    A `negative` of a row joins the batch as a text of its own, so that the row is told apart from
    it; not where the batch holds a text already that says the same.

    Args:
        texts: one sample each.
        tokenizer: of Hugging Face; it stays as it is.
        max_length: tokens of a text; cut beyond.
        seed: of the changes.
        mask_prob: of `TextAugmentation.random_mask`.
        delete_prob: of `TextAugmentation.random_delete`.
        swap_prob: of `TextAugmentation.random_swap`.
        counts: where texts that were cut are counted.

    Attributes:
        groups: of each text the number of its group: texts of one group are not to be in one
            batch, because one of them says the same as the other.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        max_length: int | LengthLimit,
        seed: int = 0,
        mask_prob: float = 0.0,
        delete_prob: float = 0.0,
        swap_prob: float = 0.0,
        counts: Counter[str] | None = None,
    ) -> None:
        self._limit = max_length if isinstance(max_length, LengthLimit) else LengthLimit(max_length)
        self._encoder = TextEncoder(tokenizer)
        self._counts = Counter() if counts is None else counts
        self._texts, self._seed = texts, seed
        self._ids: dict[str, Tensor] = {}
        for row in texts:
            for text in row:
                if text is not None and text not in self._ids:
                    self._ids[text] = self._encoded(text)
        self._probabilities = (mask_prob, delete_prob, swap_prob)
        self.groups = groups_of([(row.text, row.positive or row.text) for row in texts])
        self._samples: dict[
            str, int
        ] = {}  # of each text the number of its group, or one of its own
        for row, group in zip(texts, self.groups, strict=True):
            self._samples |= {row.text: group, row.positive or row.text: group}
        for row in texts:
            if row.negative is not None:
                self._samples.setdefault(row.negative, len(texts) + len(self._samples))

    def __len__(self) -> int:
        return len(self._texts)

    def __call__(self, rows: list[int], step: int) -> dict[str, Tensor]:
        """Returns the arguments of `ContrastivePretrainer.train_step`."""
        first = [self._texts[row].text for row in rows]
        second = [self._texts[row].positive or self._texts[row].text for row in rows]
        samples = [self.groups[row] for row in rows]
        for row in rows:
            negative = self._texts[row].negative
            if negative is not None and self._samples[negative] not in samples:
                samples.append(self._samples[negative])
                first.append(negative)
                second.append(negative)
        generator = generator_of("texts", self._seed, step)
        batch = {"sample_ids": torch.tensor(samples)}
        for number, side in enumerate((first, second), start=1):
            ids, mask = padded([self._ids[text] for text in side], self._pad)
            ids, mask = self._changed(ids, mask, generator)
            batch[f"input_ids_{number}"], batch[f"attention_mask_{number}"] = ids, mask
        return batch

    @property
    def _pad(self) -> int:
        return self._encoder.tokenizer.pad_token_id or 0

    def _encoded(self, text: str) -> Tensor:
        ids = self._encoder.plain(text)
        room = self._limit.tokens - len(self._encoder.lead) - len(self._encoder.trail)
        if len(ids) > room:
            self._limit.check(len(self._encoder.wrapped(ids)))
            self._counts["rows_cut"] += 1
            self._counts["tokens_cut"] += len(ids) - room
        return torch.tensor(self._encoder.wrapped(ids[:room]))

    def _changed(
        self, ids: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        mask_prob, delete_prob, swap_prob = self._probabilities
        tokenizer = self._encoder.tokenizer
        options = {
            "special_ids": tokenizer.all_special_ids,
            "pad_token_id": self._pad,
            "generator": generator,
        }
        if swap_prob:
            ids = TextAugmentation.random_swap(ids, swap_prob, attention_mask=mask, **options)
        if mask_prob:
            ids = TextAugmentation.random_mask(
                ids, tokenizer.mask_token_id, mask_prob, attention_mask=mask, **options
            )
        if delete_prob:
            ids, mask = TextAugmentation.random_delete(
                ids, delete_prob, attention_mask=mask, **options
            )
        return ids, mask


def padded(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Returns the rows padded on the right, `(B, S)`, and the mask of what is real."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
