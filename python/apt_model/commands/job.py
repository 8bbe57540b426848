"""What the commands that train have in common: a folder and files in, a trained folder out."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.preferences import ShuffledBatches
from ..training.files import naming, settings_of, write_whole
from ..training.loop import TrainingLoop
from .evaluation import Evaluation
from .run import Checkpoint, run_steps

NOT_SETTINGS = (
    "run", "output", "restart", "device", "checkpoint_every", "bad_rows", "tensorboard",
)  # fmt: skip


@dataclass
class Job:
    """What one command trains.

    Attributes:
        trainer: of it.
        rows: what is trained on.
        make_batch: makes the arguments of a step of some rows; None: `collate`.
        shown: the metrics on the progress bar, by the names they have there.
        measure: returns held-out figures; None: there are none.
        key: the figure that decides which state is best.
        higher_is_better: of that figure.
        save: writes the trained model into a folder.
        counts: more of the summary.
        train_step: instead of the trainer's.
        inputs: files that the run depends on besides the data and the held-out rows, by name.
    """

    trainer: TrainingLoop
    rows: Sequence[Any]
    make_batch: Callable[[Sequence[Any]], dict[str, Any]] | None
    shown: Mapping[str, str]
    measure: Callable[[], Mapping[str, float]] | None
    key: str
    higher_is_better: bool
    save: Callable[[Path], None]
    counts: Mapping[str, int] = field(default_factory=dict)
    train_step: Callable[..., Mapping[str, float]] | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)


def run_job(options: Namespace, job: Job) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`.

    All files in the output folder are of one run; the model of an earlier one stays until this
    one's is complete. A summary that says "finished" is of a run whose model was saved.
    """
    trainer, output = job.trainer, options.output
    batches = ShuffledBatches(job.rows, options.batch_size, options.seed, job.make_batch)
    held_out = {} if options.eval_data is None else {"eval_data": options.eval_data}
    settings = settings_of(options, NOT_SETTINGS, options.data, **held_out, **job.inputs)
    checkpoint = Checkpoint(output / "checkpoint.pt", settings)
    evaluation = _evaluation(options, job)
    continued = not options.restart and checkpoint.load(trainer)
    if continued:
        print(f"continuing after step {trainer.total_steps}", file=sys.stderr)
    saved = continued and _model_was_saved(output)
    if evaluation is not None and not saved:
        evaluation.start()
    total, started_at = options.epochs * batches.per_epoch, trainer.total_steps
    finished = run_steps(
        trainer, batches, total, checkpoint, options.checkpoint_every, job.shown,
        evaluation=evaluation, train_step=partial(_train_step, job, output),
    )  # fmt: skip
    _plot(trainer, output / "curves.png")
    if finished and (trainer.total_steps > started_at or not saved):
        if evaluation is not None:
            evaluation.load_best(trainer)
        write_whole(output / "model", job.save)
    summary = {
        "finished": finished,
        **job.counts,
        "before": evaluation.before if evaluation else {},
        "after": evaluation.best if evaluation and finished else {},
        "held_out": evaluation.records if evaluation else [],
        "total_steps": trainer.total_steps,
        "last_step": trainer.get_statistics(),
        "settings": settings,
        "curves": trainer.curves.as_lists(),
    }
    text = json.dumps(summary, indent=2)
    write_whole(output / "summary.json", lambda path: path.write_text(text))
    if finished and evaluation is not None:
        evaluation.forget_best()
    return summary


def _evaluation(options: Namespace, job: Job) -> Evaluation | None:
    if job.measure is None:
        return None
    evaluation = Evaluation(
        job.measure, job.key, job.higher_is_better, options.eval_every, options.patience,
        options.output / "best.pt",
    )  # fmt: skip
    job.trainer.with_state["evaluation"] = evaluation
    return evaluation


def _model_was_saved(output: Path) -> bool:
    summary = output / "summary.json"
    finished = summary.exists() and json.loads(summary.read_text())["finished"]
    return finished and (output / "model").is_dir()


def _train_step(job: Job, output: Path, **batch: Any) -> Mapping[str, float]:
    """Makes a step; after the first one removes what an earlier run has left, but for its model."""
    metrics = (job.train_step or job.trainer.train_step)(**batch)
    if job.trainer.total_steps == 1:
        for name in ("checkpoint.pt", "best.pt", "summary.json"):
            (output / name).unlink(missing_ok=True)
    return metrics


def _plot(trainer: TrainingLoop, path: Path) -> None:
    if trainer.curves.length:
        held_out = [name for name in trainer.curves.columns if name.startswith("held_out_")]
        with naming(path):
            trainer.plot_curves(path, [*trainer.monitored, *held_out])


def check_options(options: Namespace) -> None:
    """Raises for numbers that cannot be, and for folders and files that are not there."""
    for name in ("epochs", "batch_size", "max_length", "max_new_tokens", "group_size"):
        if getattr(options, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("warmup_steps", "checkpoint_every", "eval_every", "patience"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    if options.patience and options.eval_data is None:
        raise ValueError("--patience needs --eval")
    for name in ("model", "reference_model", "reward_model"):
        folder = getattr(options, name, None)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
    for file in (options.data, options.eval_data):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file} is not a file")


def trainer_options(options: Namespace) -> dict[str, Any]:
    """Returns the keyword arguments that every trainer has."""
    return {
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "autocast_dtype": None if options.autocast == "none" else options.autocast,
        "scheduler": partial(_warmup, steps=options.warmup_steps) if options.warmup_steps else None,
        "log": _tensorboard(options.tensorboard),
    }


def _warmup(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package tensorboard: {error}") from None
    return SummaryWriter(os.fspath(folder))


def pretrained(options: Namespace, kind: str, folder: Path | None = None) -> Any:
    """Returns `transformers.<kind>` of a folder; None: that of the model, which may be GGUF."""
    import transformers

    gguf = {"gguf_file": options.gguf_file} if options.gguf_file and folder is None else {}
    dtype = {} if kind == "AutoTokenizer" else {"dtype": getattr(torch, options.dtype)}
    loader = getattr(transformers, kind)
    return loader.from_pretrained(options.model if folder is None else folder, **gguf, **dtype)


def mean_over_parts(
    rows: Sequence[Any], batch_size: int, measure: Callable[[Sequence[Any]], Mapping[str, float]]
) -> dict[str, float]:
    """Returns the means over rows of what `measure` returns of parts of them; nothing for none."""
    totals: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for name, value in measure(part).items():
            totals[name] = totals.get(name, 0.0) + value * len(part)
    return {name: total / len(rows) for name, total in totals.items()}
