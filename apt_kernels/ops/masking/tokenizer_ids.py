"""The ids of a tokenizer that masking leaves alone, and the tokens that begin a word."""

from __future__ import annotations

from typing import Any

import numpy as np

SPACES = ("\u2581", "\u0120")  # the space before a word, in SentencePiece and in byte-level BPE


def special_ids(tokenizer: Any) -> list[int]:
    """Returns the ids of all special tokens, added ones too, in ascending order."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if getattr(token, "special", False)}
    return sorted(special | set(tokenizer.all_special_ids))


def vocabulary_size(tokenizer: Any) -> int:
    """Returns one more than the largest id of a tokenizer: its ids may have gaps."""
    if not hasattr(tokenizer, "get_vocab"):
        return len(tokenizer)
    return max(max(tokenizer.get_vocab().values(), default=-1) + 1, len(tokenizer))


def never_words(tokenizer: Any, rows: int | None = None) -> list[int]:
    """The ids that masking neither chooses nor draws: of special tokens, and of no token.

    Args:
        tokenizer: of Hugging Face, or alike.
        rows: rows of the model's embedding, which may be more than the tokenizer has ids.

    Returns:
        The ids in ascending order, for `special_token_ids` of `mlm_mask`.
    """
    rows = vocabulary_size(tokenizer) if rows is None else rows
    absent = set(range(rows))
    absent -= set(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else absent
    return sorted({*special_ids(tokenizer), *absent})


def spaced_ids(tokenizer: Any) -> np.ndarray | None:
    """Returns the ids of the tokens that carry the space before a word; None where none does."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    ids = [number for token, number in tokenizer.get_vocab().items() if token.startswith(SPACES)]
    return np.array(sorted(ids)) if ids else None
