"""What `apt-model train-dpo` does: a folder and a file in, a trained folder out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .model_access import train_last_layers
from .preference_data import PairTokenizer, PreferencePair, ShuffledBatches, collate, load_pairs
from .rl import DPOTrainer, create_dpo_trainer
from .training_run import Checkpoint, run_steps

SHOWN = {"loss": "loss", "accuracy": "accuracy", "margin": "reward_margin"}
NOT_SETTINGS = ("run", "output", "restart", "device", "checkpoint_every", "bad_rows")
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
    _check(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs, held_out = _load_data(options)
    trainer = _make_trainer(options, device)
    batches = ShuffledBatches(pairs, options.batch_size, options.seed)
    checkpoint = Checkpoint(options.output / "checkpoint.pt", _settings(options))
    before = evaluate(trainer, held_out, options.batch_size)
    if not options.restart and checkpoint.load(trainer):
        print(f"continuing after step {trainer.total_steps}", file=sys.stderr)
    finished = run_steps(
        trainer,
        batches,
        options.epochs * batches.per_epoch,
        checkpoint,
        options.checkpoint_every,
        SHOWN,
    )
    trainer.plot_curves(options.output / "curves.png")
    summary = {
        "finished": finished,
        "pairs": len(pairs),
        "held_out_pairs": len(held_out),
        "before": before,
        "after": evaluate(trainer, held_out, options.batch_size) if finished else {},
        "total_steps": trainer.total_steps,
        "last_step": trainer.get_statistics(),
        "settings": checkpoint.settings,
        "curves": trainer.curves.as_lists(),
    }
    if finished:
        _save_model(trainer, options)
    text = json.dumps(summary, indent=2)
    _replace(options.output / "summary.json", lambda path: path.write_text(text))
    return summary


def evaluate(
    trainer: DPOTrainer, pairs: Sequence[PreferencePair], batch_size: int
) -> dict[str, float]:
    """Returns the mean over pairs of what `eval_step` returns; nothing for no pairs."""
    totals: dict[str, float] = {}
    pairs = sorted(pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))  # less padding
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        for name, value in trainer.eval_step(**collate(part)).items():
            totals[name] = totals.get(name, 0.0) + value * len(part)
    return {name: total / len(pairs) for name, total in totals.items()}


def _check(options: Namespace) -> None:
    for name in ("epochs", "batch_size", "max_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("warmup_steps", "checkpoint_every"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    for folder in (options.model, options.reference_model):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
    for file in (options.data, options.eval_data):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file} is not a file")


def _load_data(options: Namespace) -> tuple[list[PreferencePair], list[PreferencePair]]:
    from transformers import AutoTokenizer

    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenize = PairTokenizer(
        AutoTokenizer.from_pretrained(options.model, **gguf),
        options.max_length,
        options.max_prompt_length,
        options.chat_template,
    )
    load = partial(load_pairs, tokenize=tokenize, fail_on_bad_row=options.bad_rows == "fail")
    return load(options.data), load(options.eval_data) if options.eval_data else []


def _make_trainer(options: Namespace, device: str) -> DPOTrainer:
    from transformers import AutoModelForCausalLM

    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, options.dtype))
    model = load(options.model, **gguf)
    reference = load(options.reference_model) if options.reference_model else None
    if options.train_last_layers is not None:
        train_last_layers(model, options.train_last_layers)
    return create_dpo_trainer(
        model,
        reference,
        {name: getattr(options, name) for name in CONFIG},
        device=device,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        autocast_dtype=None if options.autocast == "none" else options.autocast,
        scheduler=partial(_warmup, steps=options.warmup_steps) if options.warmup_steps else None,
    )


def _warmup(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


def _settings(options: Namespace) -> dict[str, Any]:
    """Returns what the run depends on: a checkpoint of anything else must not be continued."""
    settings = {
        name: os.fspath(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in NOT_SETTINGS
    }
    settings["data_sha256"] = hashlib.sha256(options.data.read_bytes()).hexdigest()
    return settings


def _save_model(trainer: DPOTrainer, options: Namespace) -> None:
    from transformers import AutoTokenizer

    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)

    def save(folder: Path) -> None:
        trainer.policy_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _replace(options.output / "model", save)


def _replace(path: Path, write: Any) -> None:
    """Calls `write` with a name beside `path` and renames what it made, so none is half written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(unfinished, path)
