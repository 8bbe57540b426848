"""The words of texts, and which tokens of whatever tokenizer each word has."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

# Scripts that put no space between words: there a character is a word, as in BERT's tokenizer
UNSPACED = (
    "CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI",
)  # fmt: skip


def check_tells_words(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that does not tell where in a text its tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"--whole-word: {type(tokenizer).__name__} does not tell where in a text its tokens "
            "are (it has no offsets), so words cannot be found: use a fast tokenizer"
        )


def character_words(text: str) -> list[int]:
    """Returns for each character the number of its word, -1 for spaces.

    Letters, digits and marks that follow each other are a word. Every other character is a word
    of its own, and so is every character of a script without spaces.
    """
    numbers, word, joined = [], -1, False
    for character in text:
        if character.isspace() or unicodedata.category(character) in ("Cc", "Zs"):
            numbers.append(-1)
            joined = False
            continue
        within = _joins(character)
        mark = unicodedata.category(character).startswith("M")
        if not (within and joined) and not (mark and numbers and numbers[-1] >= 0):
            word += 1
        joined = within or (mark and joined)
        numbers.append(word)
    return numbers


def _joins(character: str) -> bool:
    if not (character.isalnum() or unicodedata.category(character).startswith("M")):
        return False
    if character.isascii():
        return True
    return not unicodedata.name(character, "").startswith(UNSPACED)


def token_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Returns for each token the number of its word; neighbours of one number are one word.

    A token that covers several words makes them one. A token of spaces alone belongs to the word
    that follows, whose space it is.

    Args:
        text: what was made into tokens.
        offsets: `(begin, end)` of each token, by characters of the text.
    """
    words = character_words(text)
    covered = [sorted({w for w in words[a:b] if w >= 0}) for a, b in offsets]
    for n in range(len(covered) - 2, -1, -1):
        if not covered[n]:
            covered[n] = covered[n + 1][:1]
    numbers, last, current = [], -1, -1
    for tokens in covered:
        if not tokens or tokens[0] > last:
            current += 1
        last = max(last, tokens[-1]) if tokens else last
        numbers.append(current)
    return numbers
