"""The command `apt-model generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .arguments import check_at_least

BATCH = 16


if TYPE_CHECKING:
    from ..data.preferences import PairTokenizer


@dataclass(kw_only=True)
class GenerateOptions:
    """Prompts and responses."""

    model: Path = field(
        metadata={
            "metavar": "FOLDER",
            "help": "model folder, adapter folder, or output folder of a training command",
        }
    )
    gguf_file: str | None = field(
        default=None, metadata={"metavar": "NAME", "help": "GGUF file inside the folder"}
    )
    prompt: tuple[str, ...] = field(
        default=(), metadata={"metavar": "TEXT", "help": "prompts to answer"}
    )
    data: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "JSON lines with the string prompt to answer, too"},
    )
    chat_template: bool = field(
        default=False, metadata={"help": "put the prompts into the chat template"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a response"})
    temperature: float = field(
        default=0.0, metadata={"help": "temperature; 0: always the likeliest token"}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "draw from the likeliest tokens of this probability"}
    )
    seed: int = field(default=0, metadata={"help": "seed of what is drawn"})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, …; without it a GPU if there is one"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type of the parameters"}
    )

    def check(self) -> None:
        """Raises for what cannot be."""
        check_at_least(self, 1, "max_new_tokens")
        check_at_least(self, 0, "temperature")
        if not self.prompt and self.data is None:
            raise ValueError("give --prompt or --data")
        if not self.model.is_dir():
            raise FileNotFoundError(f"{self.model} is not a folder")


@dataclass(kw_only=True)
class Options:
    """Write responses to prompts, one JSON line each with prompt and response."""

    texts: GenerateOptions


def run(options: Options) -> int:
    """Writes the responses to stdout."""
    import torch

    from ..data.preferences import PairTokenizer
    from .folders import load_causal, model_folder
    from .samples import generate

    given = options.texts
    model, tokenizer = load_causal(given, model_folder(given.model))
    torch.manual_seed(given.seed)
    sampling: dict[str, Any] = {}
    if given.temperature:
        sampling = {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p}
    tokenize = PairTokenizer(tokenizer, chat_template=given.chat_template)
    prompts = [*given.prompt, *_read(given.data)]
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        ids = [_ids(tokenize, prompt) for prompt in part]
        written = generate(model, tokenizer, ids, given.max_new_tokens, **sampling)
        for prompt, response in zip(part, written, strict=True):
            line = {"prompt": prompt, "response": response}
            print(json.dumps(line, ensure_ascii=False), file=sys.stdout)
    return 0


def _read(path: Path | None) -> list[Any]:
    from ..data.preferences import load_rows
    from ..data.prompts import prompt_of

    if path is None:
        return []
    return load_rows(
        path, lambda row, told: prompt_of(row), None, fail_on_bad_row=True, wanted="prompt"
    )


def _ids(tokenize: PairTokenizer, prompt: Any) -> list[int]:
    ids = tokenize.prompt_ids(prompt)
    if not ids:
        raise ValueError(f"--prompt: {prompt!r} has no token")
    return ids
