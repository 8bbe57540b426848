"""What `apt-model train-reward-model` does, and how its result is loaded again."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.preferences import PairTokenizer, PreferencePair, collate
from ..rl import RewardModel, RewardModelTrainer, create_reward_model
from ..scoring.model_access import train_last_layers
from ..training.options import device_of, evaluating
from .job import Job, check_options, pretrained, run_job, trainer_options
from .train_dpo import evaluate, load_all_pairs

SHOWN = {"loss": "loss", "accuracy": "accuracy", "margin": "reward_margin"}
NOT_TAKEN = ("prompt_lengths",)
HEAD, SETTINGS = "value_head.pt", "reward_model.json"


def train_reward_model(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    check_options(options)
    tokenizer = pretrained(options, "AutoTokenizer")
    pairs, held_out = load_all_pairs(options, tokenizer)
    trainer = _make_trainer(options)
    measure = partial(evaluate, trainer, held_out, options.batch_size, NOT_TAKEN)

    def make_batch(part: Sequence[PreferencePair]) -> dict[str, Any]:
        return {k: v for k, v in collate(part).items() if k not in NOT_TAKEN}

    job = Job(
        trainer, pairs, make_batch, SHOWN, measure if held_out else None, "loss", False,
        partial(save_reward_model, trainer.model, tokenizer, options),
        {"pairs": len(pairs), "held_out_pairs": len(held_out)},
    )  # fmt: skip
    return run_job(options, job)


def _make_trainer(options: Namespace) -> RewardModelTrainer:
    base = pretrained(options, "AutoModel")
    if options.train_last_layers == 0:
        base.requires_grad_(False)
    elif options.train_last_layers is not None:
        train_last_layers(base, options.train_last_layers)
    torch.manual_seed(options.seed)  # the head begins at random
    model = create_reward_model(
        base,
        base.config.hidden_size,
        num_layers=options.head_layers,
        dropout=options.dropout,
        use_pooling=options.pooling,
    )
    return RewardModelTrainer(
        model,
        margin=options.margin,
        center_coef=options.center_coef,
        learning_rate=options.learning_rate,
        max_grad_norm=options.max_grad_norm,
        **trainer_options(options),
    )


def save_reward_model(model: RewardModel, tokenizer: Any, options: Namespace, folder: Path) -> None:
    """Writes base model, tokenizer, head, and how texts become tokens, for `load_text_reward`."""
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.value_head.state_dict(), folder / HEAD)
    settings = {
        "num_layers": options.head_layers,
        "use_pooling": model.use_pooling,
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "chat_template": options.chat_template,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2))


def load_text_reward(
    folder: Path, device: torch.device | str, batch_size: int = 16
) -> Callable[[list[str], list[str]], list[float]]:
    """Returns the reward of texts by a trained model: a function of prompts and responses.

    Args:
        folder: what the command has made.
        device: where the model is to be.
        batch_size: texts at once.
    """
    from transformers import AutoModel, AutoTokenizer

    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: train-reward-model makes such one")
    settings = json.loads((folder / SETTINGS).read_text())
    base = AutoModel.from_pretrained(folder)
    layers, pooling = settings.pop("num_layers"), settings.pop("use_pooling")
    model = RewardModel(base, base.config.hidden_size, layers, use_pooling=pooling)
    model.value_head.load_state_dict(torch.load(folder / HEAD, weights_only=True))
    model.to(device).requires_grad_(False)
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(folder), **settings)

    @torch.no_grad()
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [torch.tensor(tokenize.sequence(*texts)) for texts in zip(prompts, responses)]
        rewards: list[float] = []
        with evaluating(model):
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                ids = pad_sequence(part, batch_first=True)
                lengths = torch.tensor([len(row) for row in part]).unsqueeze(1)
                mask = (torch.arange(ids.shape[1]) < lengths).long()
                at = device_of(model)
                rewards += model.get_rewards(ids.to(at), mask.to(at)).squeeze(1).tolist()
        return rewards

    return reward
