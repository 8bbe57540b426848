"""Prompts and rewards for the commands that train a policy on its own responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.lengths import LengthLimit
from ..data.order import ShuffledBatches
from ..data.preferences import PairTokenizer
from ..data.prompts import Prompt, load_prompts
from ..rl.response_end import read_end_tokens
from ..scoring.model_access import without_wrapper
from .evaluation import mean_over_rows
from .job import Job, pretrained, shares, trainer_options
from .models import save_pretrained, trained_part
from .rewards import inputs_of, read_rewards, reward_of, stop_strings
from .samples import Samples
from .texts import PAIR_LENGTH, counted, length_limit, reading

SHOWN = {"reward": "mean_reward", "loss": "policy_loss"}


def policy_job(options: Any, make_trainer: Callable[..., Any], step: str) -> Job:
    """Returns what a command trains on prompts.

    Args:
        options: of the command.
        make_trainer: called with the policy, the reward, and the keywords of both trainers.
        step: name of its method that makes a step from prompts.
    """
    training, sampling = options.training, options.sampling
    functions = read_rewards(options.reward)  # a mistake in a file is told before models are loaded
    tokenizer = pretrained(options, "AutoTokenizer")
    limit = length_limit(options, tokenizer, PAIR_LENGTH)
    prompts, held_out, counts = load_all_prompts(options, tokenizer, limit)
    every = [*prompts, *held_out]
    batches = ShuffledBatches(
        len(prompts), training.batch_size, training.seed,
        lambda numbers, step: make_batch(every, numbers), share=shares(training),
    )  # fmt: skip
    model = trained_part(options, pretrained(options, "AutoModelForCausalLM"))
    shared = {
        **trainer_options(options, batches),
        "max_length": limit.tokens,
        "router_aux_loss_coef": options.model.router_aux_loss_coef,
        "tokenizer": tokenizer,
        "stop_strings": stop_strings(sampling.stop),
        "max_new_tokens": sampling.max_new_tokens,
        "cut_responses": sampling.cut_responses,
        "cut_penalty": sampling.cut_penalty,
    }
    ends = read_end_tokens(without_wrapper(model), None, tokenizer)
    reward = reward_of(options.reward, functions, tokenizer, every, ends, shared["device"])
    trainer = make_trainer(model, reward, shared)
    measure = partial(
        evaluate_prompts, trainer, every, range(len(prompts), len(every)), training.batch_size,
        sampling.eval_temperature,
    )  # fmt: skip
    return Job(
        trainer,
        batches,
        SHOWN,
        measure if held_out else None,
        key="mean_reward",
        higher_is_better=True,
        save=save_pretrained(trainer.policy_model, tokenizer, options),
        tokenizer=tokenizer,
        samples=Samples(
            trainer.policy_model, tokenizer, [prompt.ids for prompt in held_out or prompts]
        ),
        counts=counts,
        train_step=getattr(trainer, step),
        inputs=inputs_of(options.reward),
        settings={"reward": ", ".join(n.rpartition(":")[2] for n in options.reward.reward)},
    )


def evaluate_prompts(
    trainer: Any,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    batch_size: int,
    temperature: float,
) -> dict[str, float]:
    """Returns the means of what `eval_step` returns; nothing for no prompts.

    Rewards are means over the responses that have one, the others over all responses.

    Args:
        trainer: of a policy.
        prompts: those whose positions the reward knows.
        numbers: positions of those that are measured.
        batch_size: prompts at once.
        temperature: of the responses.
    """

    def measure(part: Sequence[int]) -> dict[str, float]:
        figures = trainer.eval_step(**make_batch(prompts, part), temperature=temperature)
        return {k: v * _answered(k, figures) for k, v in figures.items()}

    means = mean_over_rows(numbers, batch_size, measure)
    return {k: v / (_answered(k, means) or 1) for k, v in means.items()}


def _answered(name: str, figures: Mapping[str, float]) -> float:
    """Returns the share of responses that a figure is a mean of."""
    if name == "mean_reward":
        return 1 - figures["abstained_share"]
    if name.startswith("reward_"):
        return 1 - figures[name.replace("reward", "abstained_share", 1)]
    return 1.0


def load_all_prompts(
    options: Any, tokenizer: Any, limit: LengthLimit
) -> tuple[list[Prompt], list[Prompt], dict[str, int]]:
    """Returns the prompts to train on, the held-out ones, and what is counted of both.

    Args:
        options: of a command.
        tokenizer: of the model.
        limit: tokens of prompt and response.

    Raises:
        ValueError: sampling would go beyond the positions of the model.
    """
    text, run = options.text, options.run
    tokenize = PairTokenizer(
        tokenizer, limit, chat_template=text.chat_template, truncate=text.truncate
    )
    most = limit.tokens - 1 if text.max_prompt_length is None else text.max_prompt_length
    counts: Counter[str] = Counter()
    of_held_out: Counter[str] = Counter()
    prompts = load_prompts(run.data, tokenize, most, **reading(options, counts))
    held_out = []
    if run.eval_data:
        told = reading(options, of_held_out, True)
        held_out = load_prompts(run.eval_data, tokenize, most, **told)
    longest = max(len(prompt.ids) for prompt in [*prompts, *held_out])
    limit.check(longest + options.sampling.max_new_tokens)
    numbers = {"prompts": len(prompts), "held_out_prompts": len(held_out)}
    return prompts, held_out, {**numbers, **counted(counts, of_held_out)}


def make_batch(prompts: Sequence[Prompt], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Returns the arguments of a step on the prompts of these positions, padded on the right."""
    chosen = [torch.tensor(prompts[number].ids) for number in numbers]
    ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(row) for row in chosen]).unsqueeze(1)
    mask = (torch.arange(ids.shape[1]) < lengths).long()
    return {"prompts": ids, "prompt_masks": mask, "rows": torch.tensor(numbers)}
