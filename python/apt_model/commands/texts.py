"""Lengths and texts of the commands: what their options say, with model and tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..data.files import HELD_OUT, TRAINING
from ..data.lengths import LengthLimit
from .job import pretrained
from .messages import say

PAIR_LENGTH, TEXT_LENGTH = 512, 128


def length_limit(options: Any, tokenizer: Any, default: int) -> LengthLimit:
    """Returns the limit of `--max-length`, checked against the model before anything is read.

    Args:
        options: of a command.
        tokenizer: of the model.
        default: tokens, where `--max-length` was not given.

    Raises:
        ValueError: names `--max-length` and the model's limit.
    """
    config = pretrained(options, "AutoConfig")
    limit = LengthLimit.of(config, tokenizer, options.text.max_length, default)
    longest = getattr(options.text, "max_prompt_length", None)
    if longest is not None and longest >= limit.tokens:
        raise ValueError(f"--max-prompt-length must be below {limit.tokens}, got {longest}")
    return limit


def reading(options: Any, counts: Counter[str], held_out: bool = False) -> dict[str, Any]:
    """Returns the keyword arguments of the functions of `data` that load files.

    Args:
        options: of a command.
        counts: where rows are counted that were skipped, cut or dropped.
        held_out: whether the rows are held out, of a folder with several splits.
    """
    return {
        "fail_on_bad_row": options.run.bad_rows == "fail",
        "report": say,
        "columns": options.text.renamed(),
        "splits": HELD_OUT if held_out else TRAINING,
        "counts": counts,
    }


def counted(counts: Mapping[str, int], held_out: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts of both kinds of rows for the summary."""
    made = {name: count for name, count in counts.items() if count}
    return {**made, **{f"held_out_{name}": count for name, count in held_out.items() if count}}
