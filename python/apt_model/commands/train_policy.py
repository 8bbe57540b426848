"""What `apt-model train-grpo` and `apt-model train-rlhf` do."""

from __future__ import annotations

import importlib
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.preferences import BadRow, PairTokenizer, load_rows
from ..rl import create_grpo_trainer, create_rlhf_trainer
from ..scoring.model_access import train_last_layers
from .job import Job, check_options, mean_over_parts, pretrained, run_job, trainer_options
from .train_reward_model import HEAD, load_text_reward

SHOWN = {"reward": "mean_reward", "loss": "policy_loss"}
OF_GRPO = (
    "group_size", "advantage_type", "clip_range", "kl_coef", "target_kl", "use_critic",
    "aggregation", "ratio_level", "learning_rate", "max_grad_norm", "max_new_tokens", "max_length",
    "sampling_temperature",
)  # fmt: skip
OF_RLHF = (
    "ppo_epochs", "clip_epsilon", "value_loss_coef", "entropy_coef", "kl_coef", "target_kl",
    "reward_scale", "gamma", "gae_lambda", "learning_rate", "max_grad_norm", "max_new_tokens",
    "max_length", "temperature",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the row of the file it is of."""

    ids: tuple[int, ...]
    row: Mapping[str, Any]


def train_grpo(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    return _train(options, _make_grpo, "train_step_from_prompts")


def train_rlhf(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    return _train(options, _make_rlhf, "train_step")


def _train(options: Namespace, make: Callable[..., Any], step: str) -> dict[str, Any]:
    check_options(options)
    torch.manual_seed(options.seed)  # of what is sampled
    tokenizer = pretrained(options, "AutoTokenizer")
    prompts, held_out = _load_prompts(options, tokenizer)
    model = pretrained(options, "AutoModelForCausalLM")
    if options.train_last_layers is not None:
        train_last_layers(model, options.train_last_layers)
    shared = trainer_options(options)
    score = read_score(options, shared["device"])
    of_rows = options.reward is not None
    reward = RowReward(score, tokenizer, [*prompts, *held_out], of_rows)
    trainer = make(options, model, reward, shared)

    def measure() -> dict[str, float]:
        def part(rows: Sequence[Prompt]) -> dict[str, float]:
            return trainer.eval_step(**make_batch(rows), temperature=options.eval_temperature)

        return mean_over_parts(held_out, options.batch_size, part)

    def save(folder: Path) -> None:
        trainer.policy_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    job = Job(
        trainer, prompts, make_batch, SHOWN, measure if held_out else None, "mean_reward", True,
        save, {"prompts": len(prompts), "held_out_prompts": len(held_out)}, getattr(trainer, step),
        _inputs(options),
    )  # fmt: skip
    return run_job(options, job)


def _make_grpo(options: Namespace, model: Any, reward: Any, shared: Mapping[str, Any]) -> Any:
    config = {name: getattr(options, name) for name in OF_GRPO}
    reference = "copy" if options.kl_coef > 0 else None
    return create_grpo_trainer(model, reward, config, ref_policy_model=reference, **shared)


def _make_rlhf(options: Namespace, model: Any, reward: Any, shared: Mapping[str, Any]) -> Any:
    config = {name: getattr(options, name) for name in OF_RLHF}
    config["batch_size"] = options.minibatch_size
    return create_rlhf_trainer(model, reward, config, **shared)


def _load_prompts(options: Namespace, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    room = options.max_length - 1
    longest = room if options.max_prompt_length is None else options.max_prompt_length
    tokenize = PairTokenizer(tokenizer, options.max_length, longest, options.chat_template)

    def use(row: Mapping[str, Any]) -> Prompt:
        ids = tuple(tokenize.prompt_ids(row["prompt"]))
        if not ids:
            raise BadRow("'prompt' has no token")
        if len(ids) > longest:
            raise BadRow(f"'prompt' has {len(ids)} tokens, at most {longest} leave room")
        return Prompt(ids, row)

    fail = options.bad_rows == "fail"
    load = partial(load_rows, use=use, fields=("prompt",), fail_on_bad_row=fail)
    return load(options.data), load(options.eval_data) if options.eval_data else []


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
    options: Namespace, device: torch.device | str
) -> Callable[[list[Mapping[str, Any]], list[str]], Sequence[float]]:
    """Returns the reward that the options name, as a function of rows and responses.

    `--reward FILE.py:NAME` (or `package.module:NAME`) is a function of one row of the data, a
    dictionary, and one response; `--reward-model` a folder of `train-reward-model`.
    """
    if (options.reward is None) == (options.reward_model is None):
        raise ValueError("give one of --reward and --reward-model")
    if options.reward_model is not None:
        of_texts = load_text_reward(options.reward_model, device)
        return lambda rows, responses: of_texts([row["prompt"] for row in rows], responses)
    function = _import(options.reward)
    return lambda rows, responses: [
        float(function(row, response)) for row, response in zip(rows, responses, strict=True)
    ]


def _inputs(options: Namespace) -> dict[str, Path]:
    """Returns the file that decides the rewards, where there is one."""
    if options.reward_model is not None:
        return {"reward_model": options.reward_model / HEAD}
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
