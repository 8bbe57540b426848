"""What `apt-model train-dpo` does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.preferences import PairTokenizer, PreferencePair, collate, load_pairs
from ..rl import DPOTrainer, create_dpo_trainer
from ..scoring.model_access import train_last_layers
from .job import Job, check_options, mean_over_parts, pretrained, run_job, trainer_options

SHOWN = {"loss": "loss", "accuracy": "accuracy", "margin": "reward_margin"}
CONFIG = (
    "beta",
    "label_smoothing",
    "learning_rate",
    "loss_type",
    "reference_free",
    "max_grad_norm",
)


def train_dpo(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    check_options(options)
    tokenizer = pretrained(options, "AutoTokenizer")
    pairs, held_out = load_all_pairs(options, tokenizer)
    trainer = _make_trainer(options)

    def save(folder: Path) -> None:
        trainer.policy_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    job = Job(
        trainer, pairs, None, SHOWN,
        partial(evaluate, trainer, held_out, options.batch_size) if held_out else None,
        "loss", False, save, {"pairs": len(pairs), "held_out_pairs": len(held_out)},
    )  # fmt: skip
    return run_job(options, job)


def evaluate(
    trainer: Any, pairs: Sequence[PreferencePair], batch_size: int, drop: Sequence[str] = ()
) -> dict[str, float]:
    """Returns the mean over pairs of what `eval_step` returns; nothing for no pairs.

    Args:
        trainer: has an `eval_step` of pairs.
        pairs: to measure.
        batch_size: how many at once.
        drop: what of a batch that step does not take.
    """

    def measure(part: Sequence[PreferencePair]) -> dict[str, float]:
        return trainer.eval_step(**{k: v for k, v in collate(part).items() if k not in drop})

    pairs = sorted(pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))  # less padding
    return mean_over_parts(pairs, batch_size, measure)


def load_all_pairs(
    options: Namespace, tokenizer: Any
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Returns the pairs to train on and those held out."""
    tokenize = PairTokenizer(
        tokenizer, options.max_length, options.max_prompt_length, options.chat_template
    )
    load = partial(load_pairs, tokenize=tokenize, fail_on_bad_row=options.bad_rows == "fail")
    return load(options.data), load(options.eval_data) if options.eval_data else []


def _make_trainer(options: Namespace) -> DPOTrainer:
    model = pretrained(options, "AutoModelForCausalLM")
    reference = options.reference_model
    reference = reference and pretrained(options, "AutoModelForCausalLM", reference)
    if options.train_last_layers is not None:
        train_last_layers(model, options.train_last_layers)
    config = {name: getattr(options, name) for name in CONFIG}
    return create_dpo_trainer(model, reference, config, **trainer_options(options))
