"""Sentences of texts in whatever script, and the segments of documents that they make up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

# Ends that a space follows: Latin, Greek, Cyrillic; Arabic, Ethiopic, Armenian
SPACED = ".!?\u2026\u203c\u2047\u2048\u2049\u061f\u06d4\u0589\u1362\u1367\u1368\u037e"
# Ends that need no space: Chinese and Japanese; Devanagari and its kin, Khmer, Burmese, Tibetan
UNSPACED = "\u3002\uff01\uff1f\uff0e\uff61\u0964\u0965\u17d4\u17d5\u104a\u104b\u0f0d\u0f0e"
CLOSING = "\"'\u00bb\u2019\u201d)\\]\u300d\u300f\uff09\u3011\u300b\u3009"
SENTENCE_END = re.compile(rf"(?<=[{SPACED}])[{CLOSING}]*\s+|(?<=[{UNSPACED}])[{CLOSING}]*\s*")


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text, each with the marks that end it; nothing is left out."""
    text = " ".join(text.split())
    parts, begin = [], 0
    for end in SENTENCE_END.finditer(text):
        if end.end() < len(text) and text[end.end()] in SPACED + UNSPACED:
            continue  # of several marks the last one ends the sentence
        parts.append(text[begin : end.end()].strip())
        begin = end.end()
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def segments(sentences: Sequence[str], size: int) -> list[str]:
    """Returns a document in segments of at most `size` sentences, of nearly one length.

    Two sentences or more make at least two segments; no sentence is left out.
    """
    count = len(sentences)
    if count == 0:
        return []
    parts = max(-(-count // size), min(count, 2))
    bounds = [part * count // parts for part in range(parts + 1)]
    return [" ".join(sentences[a:b]) for a, b in itertools.pairwise(bounds)]


def documents(paragraphs: Sequence[Sequence[str]]) -> list[tuple[int, list[str]]]:
    """Returns the documents of a file of lines, each as the number of its first line's paragraph.

    Paragraphs are parted by blank lines. A paragraph of several lines is a document with a sentence
    a line, as BERT's corpus is written; a paragraph of one line is a document of sentences. Where
    no line is blank, each line is a document, or the whole file is one: with a sentence a line.

    Args:
        paragraphs: the lines of each.
    """
    if len(paragraphs) == 1 and len(paragraphs[0]) > 1:
        lines = [split_sentences(line) for line in paragraphs[0]]
        if any(len(sentences) > 1 for sentences in lines):
            return [(0, sentences) for sentences in lines]
    return [
        (number, list(lines) if len(lines) > 1 else split_sentences(lines[0]))
        for number, lines in enumerate(paragraphs)
        if lines
    ]
