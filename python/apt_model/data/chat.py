"""Texts of conversations, as a tokenizer's chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .conversations import Messages, shared_length
from .rows import BadRow

MARK = "\ue000text\ue000"  # of private characters, which no template looks for
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


class Rendered(NamedTuple):
    """A text, and where things are in it, by characters.

    Attributes:
        text: the whole.
        prompt_end: where the prompt with the header of the answer ends.
        spans: `(begin, end)` of each answer that counts.
    """

    text: str
    prompt_end: int
    spans: tuple[tuple[int, int], ...] = ()


class ChatRenderer:
    """Writes conversations with the chat template of a tokenizer.

    Args:
        tokenizer: of Hugging Face.
        all_turns: every turn of the assistant counts, not the last one alone.
    """

    def __init__(self, tokenizer: Any, all_turns: bool = False) -> None:
        self._tokenizer, self._all_turns = tokenizer, all_turns

    def prompt(self, messages: Messages, arguments: Mapping[str, Any]) -> Rendered:
        """Returns a prompt with the header of the answer behind it.

        A prompt that ends with words of the assistant is to be gone on with.
        """
        goes_on = messages[-1]["role"] == "assistant"
        text = self._write(
            messages, arguments, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        return Rendered(text, len(text))

    def whole(self, prompt: Messages, answer: Messages, arguments: Mapping[str, Any]) -> Rendered:
        """Returns a prompt and its answer, with what the template writes around both."""
        messages = [*prompt, *answer]
        text = self._write(messages, arguments)
        spans = []
        end = len(text)
        for number in reversed(range(len(messages))):
            if messages[number]["role"] != "assistant":
                continue
            begin = self._begin(text, messages, number, arguments)
            if number + 1 < len(messages):
                end = min(self._end(text, messages[: number + 1], arguments), end)
            if begin < end:
                spans.append((begin, end))
            end = begin
            if not self._all_turns:
                break
        if not spans:
            raise BadRow("the chat template does not write the answer")
        prompt_end = self._begin(text, messages, len(prompt), arguments)
        return Rendered(text, prompt_end, tuple(reversed(spans)))

    def left_out(self, text: str, messages: Messages) -> str | None:
        """Returns the role of a message that the template did not write, or None."""
        for message in messages:
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                return message["role"]
        return None

    def cuttable(
        self, text: str, messages: Messages, arguments: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Returns where, by characters of a prompt, what may be cut begins and ends.

        Before it stands the header of the first message of a user (with the system's message),
        behind it what ends the last message, and the header of the answer.
        """
        first = next((n for n, m in enumerate(messages) if m["role"] == "user"), 0)
        begin, end = 0, len(text)
        for number in {first, len(messages) - 1}:
            marked = [*messages]
            marked[number] = {**messages[number], "content": MARK}
            try:
                before, mark, behind = self.prompt(marked, arguments).text.partition(MARK)
            except BadRow:
                continue
            if mark and number == first and text.startswith(before):
                begin = len(before)
            if mark and number == len(messages) - 1 and text.endswith(behind):
                end = len(text) - len(behind)
        return begin, max(begin, end)

    def _begin(
        self, text: str, messages: Messages, number: int, arguments: Mapping[str, Any]
    ) -> int:
        """Returns where in the text the answer `messages[number]` begins."""
        content = messages[number]["content"].strip()
        if number == 0:
            return max(text.find(content), 0)
        header = self._write(messages[:number], arguments, add_generation_prompt=True)
        if not text.startswith(header):
            return self._found(text, messages[:number], header, content, arguments)
        begin = len(header)
        if EMPTY_THOUGHT.match(content) is None:
            empty = EMPTY_THOUGHT.match(text, begin)
            begin = empty.end() if empty else begin
        return begin

    def _found(
        self, text: str, before: Messages, header: str, content: str, arguments: Mapping[str, Any]
    ) -> int:
        """Returns where an answer begins whose header is not the generation prompt."""
        least = shared_length(text, self._write(before, arguments))
        answer = content.rpartition("</think>")[2].strip() if "<think>" in header else content
        found = text.find(content, least)
        if found < 0 and answer:
            found = text.find(answer, least)
        return found if found >= 0 else shared_length(text, header)

    def _end(self, text: str, messages: Messages, arguments: Mapping[str, Any]) -> int:
        """Returns where in the text the last of some of its messages ends."""
        return shared_length(text, self._write(messages, arguments))

    def _write(self, messages: Messages, arguments: Mapping[str, Any], **options: Any) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, **arguments, **options
            )
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template says: {error}") from None
        except (
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            ValueError,
            RecursionError,
        ) as error:
            if getattr(self._tokenizer, "chat_template", None) is None:
                raise ValueError(
                    "the tokenizer has no chat template, which rows of messages need"
                ) from None
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from None
