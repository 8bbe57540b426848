"""Texts that a model writes for held-out prompts before, during and after its training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..scoring.devices import device_of, evaluating
from ..scoring.model_access import without_wrapper
from ..training import processes
from ..training.files import write_whole

BATCH = 16


class Samples:
    """The file `samples.jsonl`: one line a step and prompt, `step`, `prompt`, `response`.

    The likeliest tokens are taken, so that only the training changes what is written.

    Args:
        model: has `generate`, as causal language models of transformers.
        tokenizer: makes texts of tokens.
        prompts: token ids of each prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Iterable[Sequence[int]]) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompts = [list(prompt) for prompt in prompts if len(prompt)]
        self._max_new_tokens = 0
        self._path = Path()
        self._lines: list[dict[str, Any]] = []

    def begin(self, path: Path, count: int, max_new_tokens: int, step: int) -> None:
        """Keeps the lines up to `step`, and writes the lines of `step` where they are missing.

        Args:
            path: of the file.
            count: the first so many prompts are answered.
            max_new_tokens: at most so many tokens an answer.
            step: that the run has made.
        """
        self._path, self._prompts = path, self._prompts[:count]
        self._max_new_tokens = max_new_tokens
        self._lines = []
        if step and path.exists():
            lines = (json.loads(line) for line in path.read_text("utf-8").splitlines())
            self._lines = [line for line in lines if line["step"] <= step]
        if not any(line["step"] == step for line in self._lines):
            self.write(step)

    def write(self, step: int) -> None:
        """Lets the model write, in all processes, and adds the lines of this step."""
        for prompt, response in self._responses():
            self._lines.append({"step": step, "prompt": prompt, "response": response})
        if processes.is_main():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
            write_whole(self._path, lambda file: file.write_text(text, "utf-8"))

    def _responses(self) -> list[tuple[str, str]]:
        texts: list[tuple[str, str]] = []
        model = without_wrapper(self._model)
        with evaluating(model):
            for start in range(0, len(self._prompts), BATCH):
                part = self._prompts[start : start + BATCH]
                responses = generate(model, self._tokenizer, part, self._max_new_tokens)
                prompts = [self._tokenizer.decode(ids) for ids in part]
                texts += zip(prompts, responses, strict=True)
        return texts


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    **sampling: Any,
) -> list[str]:  # fmt: skip
    """Returns what the model writes after each prompt, without special tokens.

    Args:
        model: a causal language model of transformers.
        tokenizer: makes texts of tokens.
        prompts: token ids.
        max_new_tokens: at most so many tokens.
        **sampling: `do_sample`, `temperature`, `top_p` and the like of `generate`.
    """
    end = tokenizer.eos_token_id
    pad = next((i for i in (tokenizer.pad_token_id, end, 0) if i is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    device = device_of(model)
    written = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
        pad_token_id=pad, **{"do_sample": False, **sampling},
    )  # fmt: skip
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
