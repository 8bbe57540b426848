"""Prompts and answers of rows: strings, or lists of messages with a role and a content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .rows import BadRow, check_has, is_absent, kind_of

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = list[Message]

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
OF_TEMPLATE = ("tools", "documents", "chat_template_kwargs")


class Preference(NamedTuple):
    """Two answers to one prompt; each is a string, or a list of messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


def preference_of(row: Mapping[str, Any]) -> Preference:
    """Returns prompt and answers of a row with `chosen`, `rejected` and, mostly, `prompt`.

    Without a prompt the answers begin with it: messages that both share, or text that both share
    up to the last space before they differ. Messages of the prompt that stand at the beginning of
    the answers too are left out there.

    Raises:
        BadRow: a column is missing or holds something else, or both answers are the same.
    """
    check_has(row, "chosen", "rejected")
    chosen, rejected = (content_of(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("'chosen' and 'rejected' must both be strings, or both lists of messages")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same")
    prompt: Any
    if is_absent(row.get("prompt")):
        prompt = "" if isinstance(chosen, str) else []
        shared = _shared_prompt(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not isinstance(prompt, str) and not prompt:
            raise BadRow("has no 'prompt', and 'chosen' and 'rejected' share no first message")
    else:
        prompt = content_of(row, "prompt", may_be_empty=True)
        if not isinstance(chosen, str) and not isinstance(rejected, str):
            prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        check_answer(name, answer)
    return Preference(prompt, chosen, rejected)


def content_of(row: Mapping[str, Any], column: str, may_be_empty: bool = False) -> str | Messages:
    """Returns the string or the checked messages of a column.

    Raises:
        BadRow: the column holds something else.
    """
    check_has(row, column)
    value = row[column]
    if isinstance(value, str):
        if not may_be_empty and not value.strip():
            raise BadRow(f"{column!r} is empty")
        return value
    if isinstance(value, Mapping) and ("content" in value or "value" in value):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{column!r} must be a string, got {kind_of(value)} (or a list of messages)")
    if not value:
        raise BadRow(f"{column!r} is an empty list")
    return [_message(column, number, message) for number, message in enumerate(value)]


def check_answer(name: str, answer: str | Messages) -> None:
    """Raises BadRow for an answer in which nothing is said, or that ends with someone else."""
    if isinstance(answer, str):
        if not answer.strip():
            raise BadRow(f"{name!r} is empty")
        return
    if not answer:
        raise BadRow(f"{name!r} holds no message behind the prompt")
    last = answer[-1]
    if last["role"] != "assistant":
        raise BadRow(f"{name!r} must end with a message of the assistant, got {last['role']!r}")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise BadRow(f"{name!r} is empty")


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a row gives to the chat template besides messages: tools, documents, more.

    Raises:
        BadRow: such a column holds something else.
    """
    given: dict[str, Any] = {}
    for column in OF_TEMPLATE:
        value = row.get(column)
        if is_absent(value):
            continue
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise BadRow(f"{column!r} must be JSON, got {kind_of(value)}") from None
        wanted = Mapping if column == "chat_template_kwargs" else (list, tuple)
        if not isinstance(value, wanted):
            raise BadRow(f"{column!r} is for the chat template, got {kind_of(value)}")
        if column == "chat_template_kwargs":
            given.update(_without_absent(value))
        elif value:
            given[column] = [_without_absent(item) for item in value]
    return given


def _message(column: str, number: int, message: Any) -> Message:
    where = f"{column!r}, message {number + 1}"
    if not isinstance(message, Mapping):
        raise BadRow(f"{where}: must have a role and a content, got {kind_of(message)}")
    made = _without_absent(message)
    if "role" not in made and "from" in made:  # as ShareGPT writes it
        made["role"] = made.pop("from")
        made.setdefault("content", made.pop("value", None))
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{where}: has no 'role'")
    made["role"] = ROLES.get(role, role)
    made["content"] = _content(where, made)
    return made


def _content(where: str, message: Message) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise BadRow(f"{where}: 'content' must be a string or a list of texts, got "
                     f"{kind_of(content)}")  # fmt: skip
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (
            isinstance(part, Mapping) and part.get("type", "text") != "text"
        ):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"{where}: 'content' must hold texts alone, got a part {kind!r}")
        texts.append(text)
    return "".join(texts)


def _without_absent(value: Any) -> Any:
    """Returns a value without keys that hold None: tables give all messages the same keys."""
    if isinstance(value, Mapping):
        return {k: _without_absent(v) for k, v in value.items() if v is not None}
    return [_without_absent(v) for v in value] if isinstance(value, list) else value


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many characters, tokens or messages two sequences begin with together."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _shared_prompt(first: Any, second: Any) -> int:
    """Returns the length of the prompt that two answers begin with."""
    shared = shared_length(first, second)
    if not isinstance(first, str):
        return min(shared, len(first) - 1, len(second) - 1)
    while shared and not first[shared - 1].isspace():  # a word is not parted
        shared -= 1
    return len(first[:shared].rstrip(" "))


def _without_prompt(prompt: Any, chosen: Messages, rejected: Messages) -> Preference:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = []
    for answer in (chosen, rejected):
        told = [(message["role"], message["content"].strip()) for message in answer]
        wanted = [(message["role"], message["content"].strip()) for message in asked]
        if told[: len(asked)] == wanted:
            answers.append(answer[len(asked) :])
        elif isinstance(prompt, str) and told[1:2] == wanted and told[0][0] == "system":
            return _without_prompt([answer[0], *asked], chosen, rejected)
        else:
            answers.append(answer)
    if isinstance(prompt, str) and not prompt.strip():
        shared = _shared_prompt(chosen, rejected)
        return Preference(chosen[:shared], chosen[shared:], rejected[shared:])
    return Preference(asked, *answers)
