"""Prompts of files, to which a model answers; each keeps its row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .conversations import Messages, content_of, template_arguments
from .files import TRAINING
from .preferences import PairTokenizer, load_rows, tell_left_out
from .rows import BadRow, RowReport, is_absent, to_stderr


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the row of the file that it stands in.

    Attributes:
        ids: of the prompt.
        row: all columns of the row, for reward functions.
        text: the prompt as the row has it.
        arguments: what the row gives to the chat template.
        removed: how many tokens were cut.
        place: where the row stands: file and line.
    """

    ids: tuple[int, ...]
    row: Mapping[str, Any]
    text: str | Messages = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    removed: int = 0
    place: str = ""


def load_prompts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenize: PairTokenizer,
    most: int,
    *,
    fail_on_bad_row: bool = False,
    report: Callable[[str], Any] = to_stderr,
    columns: Mapping[str, str] = {},
    splits: tuple[str, ...] = TRAINING,
    counts: Counter[str] | None = None,
) -> list[Prompt]:
    """Returns the prompts of files: rows of `prompt`, a string or messages, and other columns.

    Rows are known by their place in the list: the same prompt may stand in several rows. The
    other columns are not looked at; they are for the reward function.

    Args:
        paths: see `read_rows`.
        tokenize: makes tokens of a prompt.
        most: tokens of a prompt, at most; what happens to others, `tokenize` says.
        fail_on_bad_row: see `load_rows`.
        report: see `load_rows`.
        columns: see `load_rows`.
        splits: see `read_rows`.
        counts: see `load_rows`.

    Raises:
        BadRow: see `load_rows`.
    """

    def use(row: Mapping[str, Any], told: RowReport) -> Prompt:
        text = prompt_of(row)
        arguments = template_arguments(row)
        ids, removed = tokenize.cut_prompt_ids(text, most, arguments)
        if not ids:
            raise BadRow("'prompt' has no token")
        if not isinstance(text, str):
            tell_left_out(tokenize, text, arguments, told)
        return Prompt(tuple(ids), row, text, arguments, removed, told.place)

    return load_rows(
        paths, use, None, fail_on_bad_row=fail_on_bad_row, report=report, columns=columns,
        splits=splits, counts=counts, wanted="prompt",
    )  # fmt: skip


def prompt_of(row: Mapping[str, Any]) -> str | Messages:
    """Returns the prompt of a row: a string, or messages (of `messages`, if there is no `prompt`).

    Of a conversation that ends with an answer the last answer is left out.

    Raises:
        BadRow: there is none, or nothing is asked in it.
    """
    if is_absent(row.get("prompt")) and not is_absent(row.get("messages")):
        messages = content_of(row, "messages")
        while messages and not isinstance(messages, str) and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadRow("'messages' holds no message but answers")
        return messages
    prompt = content_of(row, "prompt")
    if not isinstance(prompt, str) and not any(m["content"].strip() for m in prompt):
        raise BadRow("'prompt' is empty")
    return prompt
