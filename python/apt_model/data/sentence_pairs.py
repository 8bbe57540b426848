"""Pairs of segments for next-sentence prediction (Devlin et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SPECIALS = 3  # [CLS] a [SEP] b [SEP]


class NSPDataBuilder:
    """Makes pairs of which the second segment follows the first, or was drawn at random."""

    @staticmethod
    def create_nsp_pairs(
        sentences: Sequence[str] | Sequence[Sequence[str]],
        tokenizer: Any,
        max_length: int = 512,
        negative_ratio: float = 0.5,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `input_ids, attention_mask, nsp_labels` of pairs `[CLS] a [SEP] b [SEP]`.

        Shapes `(N, S)`, `(N, S)` and `(N,)`; padded on the right. There is one pair for every
        sentence that another one follows, in order. Of those pairs `round(negative_ratio * N)`,
        drawn at random, get a random second sentence instead: not a and not the one that follows.

        Args:
            sentences: those of one document in their order, or of several documents, a list each.
            tokenizer: of Hugging Face (or a `tokenizers.Tokenizer`) with [CLS] and [SEP].
            max_length: tokens of a pair; the longer segment is cut at its end.
            negative_ratio: share of the pairs with label 1; the others have label 0.
            generator: of the random choices, on the CPU; None: PyTorch's own.

        Raises:
            ValueError: too few sentences, one without tokens, or an option that cannot be.
        """
        if not 0 <= negative_ratio <= 1:
            raise ValueError(f"negative_ratio must be in [0, 1], got {negative_ratio}")
        if max_length < SPECIALS + 2:
            raise ValueError(f"max_length must be at least {SPECIALS + 2}, got {max_length}")
        documents: Any = [sentences] if all(isinstance(s, str) for s in sentences) else sentences
        texts = [text for document in documents for text in document]
        firsts: list[int] = []
        start = 0
        for document in documents:
            firsts += range(start, start + len(document) - 1)
            start += len(document)
        negatives = round(negative_ratio * len(firsts))
        if not firsts or (negatives and len(texts) < SPECIALS):
            raise ValueError(
                f"sentences must hold one that follows another and, for random pairs, a third one; "
                f"got {len(texts)}"
            )
        ids, (cls, sep, pad) = _tokenize(texts, tokenizer)
        labels = torch.zeros(len(firsts), dtype=torch.long)
        labels[torch.randperm(len(firsts), generator=generator)[:negatives]] = 1
        # Of the n - 2 sentences that are neither a nor its successor, by their numbers
        draws = torch.randint(max(len(texts) - 2, 1), (len(firsts),), generator=generator)
        a = torch.tensor(firsts)
        b = torch.where(labels == 1, draws + 2 * (draws >= a), a + 1)
        rows = [
            _joined(ids[i], ids[j], cls, sep, max_length)
            for i, j in zip(firsts, b.tolist(), strict=True)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
        return input_ids, mask, labels


def _tokenize(texts: Sequence[str], tokenizer: Any) -> tuple[list[list[int]], tuple[int, int, int]]:
    """Returns the tokens of every text without specials, and the ids of [CLS], [SEP] and [PAD]."""
    if hasattr(tokenizer, "token_to_id") and not callable(tokenizer):
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        cls, sep, pad = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    else:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        pad = tokenizer.pad_token_id
    if cls is None or sep is None:
        raise ValueError("the tokenizer has no [CLS] or no [SEP]")
    empty = [number for number, tokens in enumerate(ids) if not tokens]
    if empty:
        raise ValueError(f"sentence {empty[0]} has no tokens: {texts[empty[0]]!r}")
    return ids, (cls, sep, 0 if pad is None else pad)


def _joined(a: list[int], b: list[int], cls: int, sep: int, max_length: int) -> Tensor:
    room = max_length - SPECIALS
    keep_a = min(len(a), max(room - len(b), room - room // 2))
    keep_b = min(len(b), room - keep_a)
    return torch.tensor([cls, *a[:keep_a], sep, *b[:keep_b], sep])
