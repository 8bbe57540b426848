"""Options of texts: what is read of a row, and how long it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Truncation = Literal["prompt-start", "prompt-end", "answer", "drop"]

COLUMNS = "NAME=COLUMN, for data whose columns have other names, such as prompt=question"


class _Checked:
    """Checks that options of texts share."""

    max_length: int | None
    columns: Sequence[str]

    def check(self) -> None:
        """Raises ValueError that names the option, what was expected and what came."""
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        longest, prompt = self.max_length, getattr(self, "max_prompt_length", None)
        if longest is not None and prompt is not None and prompt >= longest:
            raise ValueError(
                f"--max-prompt-length must be below --max-length {longest}, got {prompt}"
            )
        self.renamed()

    def renamed(self) -> dict[str, str]:
        """Returns for each column that has another name in the data that name."""
        made = {}
        for pair in self.columns:
            name, equals, column = pair.partition("=")
            if not (name and equals and column):
                raise ValueError(f"--columns: expected NAME=COLUMN, got {pair!r}")
            made[name] = column
        return made


@dataclass(kw_only=True)
class TextOptions(_Checked):
    """Text."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of prompt and answer, cut beyond as --truncate says; without it 512, "
            "where the model has as many positions"
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of a prompt; without it a row that is too long keeps half of "
            "--max-length for its prompt"
        },
    )
    truncate: Truncation = field(
        default="prompt-start",
        metadata={
            "help": "what is cut of a row that is longer: the prompt's start or end (BOS and the "
            "headers of the chat stay), the answer's end, or nothing: the row is dropped"
        },
    )
    chat_template: bool = field(
        default=False,
        metadata={
            "help": "put prompts and answers that are strings into the chat template; messages "
            "always are"
        },
    )
    answer_turns: Literal["last", "all"] = field(
        default="last",
        metadata={"help": "which turns of the assistant count in a row of several"},
    )
    columns: tuple[str, ...] = field(
        default=(), metadata={"metavar": "NAME=COLUMN", "help": COLUMNS}
    )


@dataclass(kw_only=True)
class PromptOptions(_Checked):
    """Text."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of prompt and response, sampling ends there; without it 512, where "
            "the model has as many positions"
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "rows with longer prompts cannot be used, or are cut as --truncate says; "
            "without it one less than --max-length"
        },
    )
    truncate: Truncation = field(
        default="drop",
        metadata={
            "help": "what is cut of a longer prompt: its start or end (BOS and the headers of the "
            "chat stay); answer, drop: nothing, the row is dropped"
        },
    )
    chat_template: bool = field(
        default=False,
        metadata={
            "help": "put prompts that are strings into the chat template; messages always are"
        },
    )
    columns: tuple[str, ...] = field(
        default=(), metadata={"metavar": "NAME=COLUMN", "help": COLUMNS}
    )


@dataclass(kw_only=True)
class DocumentOptions(_Checked):
    """Text."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of a sequence; without it 128, where the model has as many positions"
        },
    )
    long_texts: Literal["window", "pack", "cut"] = field(
        default="window",
        metadata={
            "help": "a text that is longer becomes windows; all texts are packed into full "
            "sequences; or the end of a longer text is cut (and counted)"
        },
    )
    columns: tuple[str, ...] = field(
        default=(), metadata={"metavar": "NAME=COLUMN", "help": COLUMNS}
    )


@dataclass(kw_only=True)
class ContrastiveTextOptions(_Checked):
    """Text."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of a text, cut (and counted) beyond; without it 128, where the model "
            "has as many positions"
        },
    )
    columns: tuple[str, ...] = field(
        default=(), metadata={"metavar": "NAME=COLUMN", "help": COLUMNS}
    )
