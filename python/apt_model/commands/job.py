"""The run of a command that trains: a folder and files in, a trained folder out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.order import ShuffledBatches, hash_of
from ..rl import RewardModel
from ..scoring.loading import load_config, load_model, load_tokenizer
from ..scoring.model_access import without_wrapper
from ..scoring.saving import check_saving
from ..training import processes
from ..training.checkpoint import PREVIOUS, Checkpoint
from ..training.files import FolderLock, naming, sha256_of, sha256_of_all, write_whole
from ..training.loop import TrainingLoop
from ..training.schedule import schedule
from .arguments import COMMAND, as_mapping, deciding
from .evaluation import Evaluation
from .messages import one_voice, say
from .options import RunOptions, TrainingOptions
from .reports import Reports
from .run import run_steps
from .samples import Samples


@dataclass
class Job:
    """The trainer of one command, its batches and its measurements.

    Attributes:
        trainer: the trainer.
        batches: what it trains on.
        shown: the metrics on the progress bar, by the names they have there.
        measure: returns held-out figures; None: there are none.
        key: the figure that decides which state is best.
        higher_is_better: whether a higher figure is better.
        save: writes the trained model into a folder.
        check_saving: raises where `save` would fail; called with that folder before the first step;
            None: the model is saved beside it to see.
        counts: more of the summary.
        train_step: instead of the trainer's.
        tokenizer: makes texts of the batches' tokens; None: they hold none.
        samples: lets the model write; None: it cannot.
        inputs: files and folders that the run depends on besides model and data, by name.
        settings: more that decides the result, in JSON's types.
    """

    trainer: TrainingLoop
    batches: ShuffledBatches
    shown: Mapping[str, str]
    measure: Callable[[], Mapping[str, float]] | None
    key: str
    higher_is_better: bool
    save: Callable[[Path], None]
    check_saving: Callable[[Path], Any] | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    train_step: Callable[..., Mapping[str, float]] | None = None
    tokenizer: Any = None
    samples: Samples | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def run_command(
    command: str, make_job: Callable[[Any], Job], options: Any
) -> dict[str, Any] | None:
    """Trains as the options of a command say; returns what is written to `summary.json`.

    Args:
        command: its name.
        make_job: of the command.
        options: groups, of which `run` is RunOptions and `training` TrainingOptions.

    Returns:
        None for a dry run, which prints what would be done.
    """
    effective = {COMMAND: command, **as_mapping(options)}
    run = options.run
    run.device = str(processes.begin(run.device, run.process_timeout))
    with _locked(run.output):
        torch.manual_seed(options.training.seed)  # heads and queues begin at random
        with one_voice():
            job = make_job(options)
        if processes.rank():  # each draws samples and dropout of its own
            torch.manual_seed(hash_of("process", options.training.seed, processes.rank()))
        steps = total_steps(options.training, job.batches.per_epoch)
        if run.samples and job.samples is None:
            raise ValueError(f"--samples: {command} trains no model that writes texts")
        if run.dry_run:
            from .preview import preview  # which knows jobs

            if processes.is_main():
                print(preview(job, steps, job.tokenizer))
            return None
        settings = {
            **deciding(options),
            **job.settings,
            **processes.on_main(lambda: _hashes(options, job)),
        }
        return run_job(run, job, steps, settings, effective)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, in the main process, and refuses in all where it is taken."""
    lock = FolderLock(folder)
    processes.on_main(lock.take)
    try:
        yield
    finally:
        if processes.is_main():
            lock.free()


def _hashes(options: Any, job: Job) -> dict[str, str]:
    """Returns the hashes of what the run reads: where it lies does not count."""
    hashes = {"data_sha256": sha256_of_all(options.run.data)}
    models = {**job.inputs, "model": options.model.model}
    for name, path in models.items():
        if path is not None:
            hashes[f"{name}_sha256"] = sha256_of(path, whole=False)
    return hashes


def total_steps(training: TrainingOptions, per_epoch: int) -> int:
    """Returns the number of steps that the options ask for."""
    return training.epochs * per_epoch if training.max_steps is None else training.max_steps


def run_job(
    run: RunOptions,
    job: Job,
    steps: int,
    settings: Mapping[str, Any],
    effective: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains as the options of the run say; returns what is written to `summary.json`.

    All files in the output folder are of one run; the model of an earlier one stays until this
    one's is complete. A summary that says "finished" is of a run whose model was saved.

    Args:
        run: the options.
        job: what is trained.
        steps: of the run.
        settings: what decides the result, in JSON's types.
        effective: all options, written to `run.yaml`.
    """
    trainer, output, check_saving = job.trainer, run.output, job.check_saving
    assert output is not None  # a run that trains has a folder
    if check_saving is not None:
        processes.on_main(lambda: check_saving(output / "model"))
    elif not run.fsdp:  # of shards the main process alone could save nothing
        processes.on_main(lambda: _try_saving(job, output / "model"))
    evaluation = _evaluation(run, job, output)
    parts = {} if evaluation is None else {"evaluation": evaluation}
    checkpoint = Checkpoint(output / "checkpoint.pt", settings, parts)
    previous = run.resume == PREVIOUS
    continued = not run.restart and checkpoint.load(trainer, previous)
    if previous and not continued:
        raise FileNotFoundError(f"{checkpoint.previous} is missing: --resume previous needs it")
    if continued:
        say(f"continuing after step {trainer.total_steps}")
    saved = processes.on_main(lambda: _saved_model(output)) if continued else None
    if evaluation is not None and (saved is None or trainer.total_steps < steps):
        evaluation.start(saved)
    started_at = trainer.total_steps
    samples = job.samples if run.samples else None
    if samples is not None:
        samples.begin(output / "samples.jsonl", run.samples, run.sample_tokens, started_at)
    reports = Reports(run, trainer.curves, settings) if processes.is_main() else None

    def after_step() -> None:
        step = trainer.total_steps
        is_measured = run.eval_every and step % run.eval_every == 0
        if samples is not None and (step == steps or is_measured):
            samples.write(step)
        if reports is not None:
            reports()

    finished = run_steps(
        trainer, job.batches, steps, checkpoint, run.checkpoint_every, job.shown,
        evaluation=evaluation, train_step=_step(job, output, effective), after_step=after_step,
    )  # fmt: skip
    if reports is not None:
        reports.close()
    if processes.is_main():
        _plot(trainer, output / "curves.png")
    if finished and (trainer.total_steps > started_at or saved is None):
        _save_model(job, evaluation, checkpoint, output / "model")
    summary = {
        "finished": finished,
        **job.counts,
        "before": evaluation.before if evaluation else {},
        "after": evaluation.best if evaluation and finished else {},
        "held_out": evaluation.records if evaluation else [],
        "total_steps": trainer.total_steps,
        "last_step": trainer.get_statistics(),
        "settings": dict(settings),
        "curves": trainer.curves.as_lists(),
    }
    text = json.dumps(summary, indent=2)
    processes.on_main(
        lambda: write_whole(output / "summary.json", lambda path: path.write_text(text))
    )
    if finished and evaluation is not None and evaluation.best["step"] == trainer.total_steps:
        evaluation.forget_best()  # the checkpoint holds the same
    return summary


def _try_saving(job: Job, folder: Path) -> None:
    """Raises where the model could not be saved at the end of the run."""
    model = without_wrapper(next(iter(job.trainer.modules())))
    model = getattr(model, "base_model", model) if isinstance(model, RewardModel) else model
    if hasattr(model, "save_pretrained"):
        check_saving(model, job.tokenizer, folder)


def _save_model(
    job: Job, evaluation: Evaluation | None, checkpoint: Checkpoint, folder: Path
) -> None:
    if evaluation is not None and evaluation.best_is_saved:
        return  # what came after it was no better
    if evaluation is not None:
        evaluation.load_best(job.trainer)
    try:
        with processes.unsharded(job.trainer.modules()):
            processes.on_main(lambda: write_whole(folder, job.save))
    except Exception:
        say(
            f"the trained state is kept in {checkpoint.path}: the same command, started again, "
            "saves the model without training anew"
        )
        raise


def _evaluation(run: RunOptions, job: Job, output: Path) -> Evaluation | None:
    if job.measure is None:
        return None
    rows = sha256_of_all(run.eval_data) if run.eval_data else ""
    return Evaluation(
        job.measure, job.key, job.higher_is_better, run.eval_every, run.patience,
        output / "best.pt", rows,
    )  # fmt: skip


def _saved_model(output: Path) -> dict[str, float] | None:
    """Returns the held-out figures of the model that a finished run saved; None where it did not.

    A summary that cannot be read is told, and taken as none.
    """
    path = output / "summary.json"
    if not path.exists() or not (output / "model").is_dir():
        return None
    try:
        summary = json.loads(path.read_text())
        return summary["after"] if summary["finished"] else None
    except (ValueError, KeyError, TypeError) as error:
        say(f"{path} is damaged and left out: {type(error).__name__}: {error}")
        return None


def _step(
    job: Job, output: Path, effective: Mapping[str, Any] | None
) -> Callable[..., Mapping[str, float]]:
    """Returns what makes a step.

    After the first one of a run it removes what an earlier run has left, but for its model.
    """
    trainer: Any = job.trainer  # each trainer has a `train_step` of its own arguments
    step, first = job.train_step or trainer.train_step, trainer.total_steps + 1

    def train_step(**batch: Any) -> Mapping[str, float]:
        metrics = step(**batch)
        if not processes.is_main():
            return metrics
        if trainer.total_steps == first and effective is not None:
            write_options(output / "run.yaml", effective)
        if trainer.total_steps == 1:
            for name in ("checkpoint.pt", "checkpoint.previous.pt", "best.pt", "summary.json"):
                (output / name).unlink(missing_ok=True)
        return metrics

    return train_step


def write_options(path: Path, effective: Mapping[str, Any]) -> None:
    """Writes options as a file for `--config`."""
    import yaml

    text = yaml.safe_dump(dict(effective), sort_keys=False, allow_unicode=True)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _plot(trainer: TrainingLoop, path: Path) -> None:
    if trainer.curves.length:
        held_out = [name for name in trainer.curves.columns if name.startswith("held_out_")]
        with naming(path):
            trainer.plot_curves(path, [*trainer.monitored, *held_out])


def shares(training: TrainingOptions) -> Callable[[list[int]], list[int]]:
    """Returns what tells the rows of a batch that this process trains on."""
    return partial(processes.share, least=training.gradient_accumulation_steps)


def trainer_options(options: Any, batches: ShuffledBatches) -> dict[str, Any]:
    """Returns the keyword arguments that every trainer has, of the options of a command."""
    training: TrainingOptions = options.training
    steps = total_steps(training, batches.per_epoch)
    warmup = training.warmup_steps
    if training.warmup_ratio is not None:
        warmup = round(training.warmup_ratio * steps)
    made = schedule(training.schedule, warmup, steps, training.read_schedule_options())
    return {
        "device": options.run.device,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "autocast_dtype": (
            None if options.precision.autocast == "none" else options.precision.autocast
        ),
        "scheduler": made,
        "decay_norms_and_biases": training.decay_norms_and_biases,
    }


def pretrained(options: Any, kind: str, folder: Path | None = None, **more: Any) -> Any:
    """Returns `transformers.<kind>` of a folder; None: that of the model, which may be GGUF.

    `more` goes to `from_pretrained`.
    """
    model = options.model
    gguf = model.gguf_file if folder is None else None
    folder = model.model if folder is None else folder
    if kind == "AutoTokenizer":
        return load_tokenizer(folder, gguf)
    if kind == "AutoConfig":
        return load_config(folder, gguf)
    return load_model(folder, kind, getattr(torch, options.precision.dtype), gguf, **more)
