"""Prompts and rewards for the commands that train a policy on its own responses."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.order import ShuffledBatches, of_rows
from ..data.preferences import BadRow, PairTokenizer, load_rows
from ..training import processes
from .evaluation import mean_over_rows
from .job import Job, pretrained, trainer_options
from .models import save_pretrained, trained_part
from .reward_folder import load_text_reward

SHOWN = {"reward": "mean_reward", "loss": "policy_loss"}


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the row of the file it is of."""

    ids: tuple[int, ...]
    row: Mapping[str, Any]


def policy_job(options: Any, make_trainer: Callable[..., Any], step: str) -> Job:
    """Returns what a command trains on prompts.

    Args:
        options: of the command.
        make_trainer: called with the policy, the reward, and the keywords of every trainer.
        step: name of its method that makes a step from prompts.
    """
    training = options.training
    tokenizer = pretrained(options, "AutoTokenizer")
    prompts, held_out = load_all_prompts(options, tokenizer)
    batches = ShuffledBatches(
        len(prompts), training.batch_size, training.seed, of_rows(prompts, make_batch),
        share=processes.share,
    )  # fmt: skip
    model = trained_part(options, pretrained(options, "AutoModelForCausalLM"))
    shared = trainer_options(options, batches)
    score = read_score(options.reward, shared["device"])
    of_rows_too = options.reward.reward is not None
    reward = RowReward(score, tokenizer, [*prompts, *held_out], of_rows_too)
    trainer = make_trainer(model, reward, shared)
    measure = partial(
        evaluate_prompts, trainer, held_out, training.batch_size, options.sampling.eval_temperature
    )
    return Job(
        trainer,
        batches,
        SHOWN,
        measure if held_out else None,
        key="mean_reward",
        higher_is_better=True,
        save=save_pretrained(trainer.policy_model, tokenizer),
        counts={"prompts": len(prompts), "held_out_prompts": len(held_out)},
        train_step=getattr(trainer, step),
        inputs=inputs_of(options.reward),
        settings={"reward": (options.reward.reward or "").rpartition(":")[2]},
    )


def evaluate_prompts(
    trainer: Any, prompts: Sequence[Prompt], batch_size: int, temperature: float
) -> dict[str, float]:
    """Returns the mean over prompts of what `eval_step` returns; nothing for no prompts."""

    def measure(part: list[Prompt]) -> dict[str, float]:
        return trainer.eval_step(**make_batch(part), temperature=temperature)

    return mean_over_rows(prompts, batch_size, measure)


def load_all_prompts(options: Any, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts to train on and the held-out ones, of the options of a command."""
    text, run = options.text, options.run
    room = text.max_length - 1
    longest = room if text.max_prompt_length is None else text.max_prompt_length
    tokenize = PairTokenizer(tokenizer, text.max_length, longest, text.chat_template)

    def use(row: Mapping[str, Any]) -> Prompt:
        ids = tuple(tokenize.prompt_ids(row["prompt"]))
        if not ids:
            raise BadRow("'prompt' has no token")
        if len(ids) > longest:
            raise BadRow(f"'prompt' has {len(ids)} tokens, at most {longest} leave room")
        return Prompt(ids, row)

    fail = run.bad_rows == "fail"
    load = partial(load_rows, use=use, fields=("prompt",), fail_on_bad_row=fail)
    return load(run.data), load(run.eval_data) if run.eval_data else []


def make_batch(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Returns the arguments of a step on prompts, padded on the right."""
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    mask = (torch.arange(ids.shape[1]) < lengths).long()
    return {"prompts": ids, "prompt_masks": mask}


class RowReward:
    """A reward of rows of the data and of the responses' texts, as a reward model.

    Args:
        score: called with as many rows as responses; returns as many numbers.
        tokenizer: decodes the responses.
        prompts: whose rows the sampled sequences are of.
        of_rows: whether `score` reads more of a row than its prompt; then rows of the same prompt
            must not differ.
    """

    def __init__(
        self,
        score: Callable[[list[Mapping[str, Any]], list[str]], Sequence[float]],
        tokenizer: Any,
        prompts: Sequence[Prompt],
        of_rows: bool = True,
    ) -> None:
        self._score = score
        self._tokenizer = tokenizer
        self._rows: dict[tuple[int, ...], Mapping[str, Any]] = {}
        for prompt in prompts:
            if self._rows.setdefault(prompt.ids, prompt.row) != prompt.row and of_rows:
                raise ValueError(f"two rows have the prompt {prompt.row['prompt']!r} and differ")

    def __call__(self, ids: Tensor, masks: Tensor, response_token_mask: Tensor) -> Sequence[float]:
        """Returns the rewards of sampled sequences."""
        response = response_token_mask != 0
        asked = ((masks != 0) & ~response).cpu()
        ids, response = ids.cpu(), response.cpu()
        rows = [self._rows[tuple(row[m].tolist())] for row, m in zip(ids, asked, strict=True)]
        answers = [row[m].tolist() for row, m in zip(ids, response, strict=True)]
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return self._score(rows, texts)


def read_score(
    options: Any, device: torch.device | str
) -> Callable[[list[Mapping[str, Any]], list[str]], Sequence[float]]:
    """Returns the reward that the options name, as a function of rows and responses.

    `--reward FILE.py:NAME` (or `package.module:NAME`) is a function of one row of the data, a
    dictionary, and one response; `--reward-model` a folder of `train-reward-model`.
    """
    if options.reward_model is not None:
        of_texts = load_text_reward(options.reward_model, device)
        return lambda rows, responses: of_texts([row["prompt"] for row in rows], responses)
    function = _import(options.reward)
    return lambda rows, responses: [
        float(function(row, response)) for row, response in zip(rows, responses, strict=True)
    ]


def inputs_of(options: Any) -> dict[str, Path]:
    """Returns the file that decides the rewards, where there is one."""
    if options.reward_model is not None:
        return {"reward_model": options.reward_model}
    where = options.reward.rpartition(":")[0]
    file = where if where.endswith(".py") else importlib.util.find_spec(where).origin
    return {"reward": Path(file)} if file is not None and Path(file).is_file() else {}


def _import(name: str) -> Callable[[Mapping[str, Any], str], float]:
    where, _, attribute = name.rpartition(":")
    if not where:
        raise ValueError(f"--reward must be FILE.py:NAME or package.module:NAME, got {name!r}")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, attribute)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"--reward {name}: {type(error).__name__}: {error}") from None
