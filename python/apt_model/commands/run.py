"""A run of many steps: progress bar, whole checkpoints, stopping and continuing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from torch import Tensor

from ..training import processes
from ..training.checkpoint import Checkpoint
from ..training.loop import TrainingLoop
from ..training.state import random_state, set_random_state
from .evaluation import Evaluation


class Batches(Protocol):
    """The batches of a run."""

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """Returns the keyword arguments of `train_step` number `step`, counted from 0."""


class StopRequest:
    """Whether SIGINT or SIGTERM has come; the second one of them ends the program as usual."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Within this context the first signal is only noted."""
        previous: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self.came = True
            for known, before in previous.items():
                signal.signal(known, before)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
        try:
            yield self
        finally:
            for known, before in previous.items():
                signal.signal(known, before)


def run_steps(
    trainer: Any,
    batches: Batches,
    total_steps: int,
    checkpoint: Checkpoint,
    checkpoint_every: int,
    shown: Mapping[str, str],
    description: str = "training",
    evaluation: Evaluation | None = None,
    train_step: Callable[..., Mapping[str, float]] | None = None,
    after_step: Callable[[], Any] = lambda: None,
) -> bool:
    """Trains up to `total_steps` with a progress bar; returns whether it got there or stagnates.

    Writes the checkpoint every `checkpoint_every` steps, at the end, when asked to stop by SIGINT
    or SIGTERM, which ends the run after the step under way, and where a step or a measurement
    raises: then of the state before that step or measurement. Of several processes the main one
    shows the bar; a signal to any of them stops all after the same step.

    Args:
        trainer: has `train_step(**batch)`; continues at its `total_steps`.
        batches: batches of the run.
        total_steps: steps of the run.
        checkpoint: where the run is kept.
        checkpoint_every: steps; 0: only at the end, when stopped or where something raises.
        shown: the metrics on the bar, by the names they have there.
        description: text before the bar.
        evaluation: what is measured as the training goes.
        train_step: instead of the trainer's.
        after_step: called after each step and its measurement.
    """
    from tqdm import tqdm

    step = trainer.train_step if train_step is None else train_step

    def measure() -> None:
        if evaluation is not None:
            evaluation.after_step(trainer, trainer.total_steps == total_steps)

    def stagnates() -> bool:
        return evaluation is not None and evaluation.stagnates

    def goes_on() -> bool:
        return trainer.total_steps < total_steps and not stagnates()

    with (
        StopRequest().listening() as stop,
        tqdm(
            total=total_steps, initial=trainer.total_steps, desc=description, unit="step",
            disable=not processes.is_main(),
        ) as bar,
    ):  # fmt: skip
        if trainer.total_steps:
            measure()  # where the measurement of the last step raised
        speed = _Speed(bar)
        while goes_on() and not processes.agree(stop.came):
            with _kept(trainer, checkpoint):
                batch = batches[trainer.total_steps]
                metrics = step(**batch)
                figures = {name: f"{metrics[key]:.3f}" for name, key in shown.items()}
                bar.set_postfix({**figures, **speed.after(batch, metrics)})
                bar.update()
                measure()
                after_step()
            if checkpoint_every and trainer.total_steps % checkpoint_every == 0:
                checkpoint.save(trainer)
        if trainer.total_steps > checkpoint.steps or not checkpoint.is_written:
            checkpoint.save(trainer)
    return trainer.total_steps >= total_steps or stagnates()


class _Speed:
    """How many tokens a second were trained on since the run began."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._tokens = bar, 0.0

    def after(self, batch: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, str]:
        """Returns the speed after a step, by the name it has on the bar; nothing without tokens."""
        self._tokens += processes.count() * tokens_of(batch, metrics)
        seconds = self._bar.format_dict["elapsed"]
        if not self._tokens or not seconds:
            return {}
        return {"tokens/s": f"{self._tokens / seconds:.0f}"}


def tokens_of(batch: Mapping[str, Any], metrics: Mapping[str, float]) -> float:
    """Returns the number of real tokens in a batch, the responses to prompts included."""
    masks = [v for k, v in batch.items() if "mask" in k and isinstance(v, Tensor)]
    tokens = float(sum(int(mask.sum()) for mask in masks))
    return tokens + metrics.get("response_length", 0.0) * len(batch.get("prompts", ()))


@contextmanager
def _kept(trainer: TrainingLoop, checkpoint: Checkpoint) -> Iterator[None]:
    """Saves the whole steps made so far where what is done within this context raises."""
    steps, random = trainer.total_steps, random_state(trainer.device)
    try:
        yield
    except Exception:
        # Saving needs all processes, and the others may not have raised
        alone = processes.count() == 1
        if alone and trainer.total_steps > checkpoint.steps and not trainer.is_mid_step:
            if trainer.total_steps == steps:  # what it drew it draws again
                set_random_state(random, trainer.device)
            with suppress(Exception):  # the first error tells more
                checkpoint.save(trainer)
        raise
