"""A run of many steps: progress bar, whole checkpoints, stopping and continuing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from ..training.files import save_tensors
from ..training.loop import TrainingLoop
from ..training.state import random_state, set_random_state
from .evaluation import Evaluation


class Batches(Protocol):
    """What a run takes its batches from."""

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """Returns the keyword arguments of `train_step` number `step`, counted from 0."""


class Checkpoint:
    """The file a run continues from.

    Args:
        path: of the file.
        settings: what the run depends on, in JSON's types; a checkpoint of others is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.steps = 0  # of the state that the file holds

    def save(self, trainer: TrainingLoop) -> None:
        """Writes all but the frozen parameters; the file is either the old or the new one."""
        state = {"settings": self.settings, "trainer": trainer.state_dict(include_frozen=False)}
        save_tensors(self.path, state)
        self.steps = trainer.total_steps

    def load(self, trainer: TrainingLoop) -> bool:
        """Continues from the file and returns True; returns False where there is none.

        Raises:
            ValueError: the file is of a run with other settings.
        """
        if not self.path.exists():
            return False
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        theirs = state["settings"]
        if theirs != self.settings:
            names = sorted(theirs.keys() | self.settings.keys())
            changed = [n for n in names if theirs.get(n) != self.settings.get(n)]
            raise ValueError(
                f"{self.path} is of a run with other settings ("
                + ", ".join(f"{n}: {theirs.get(n)!r} there" for n in changed)
                + "); start anew or choose another folder"
            )
        trainer.load_state_dict(state["trainer"])
        self.steps = trainer.total_steps
        return True


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
            for known, handler in previous.items():
                signal.signal(known, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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
) -> bool:
    """Trains up to `total_steps` with a progress bar; returns whether it got there or stagnates.

    Writes the checkpoint every `checkpoint_every` steps, at the end, when asked to stop by SIGINT
    or SIGTERM, which ends the run after the step under way, and where a step or a measurement
    raises: then of the state before that step or measurement.

    Args:
        trainer: has `train_step(**batch)`; continues at its `total_steps`.
        batches: of the run.
        total_steps: of the run.
        checkpoint: where the run is kept.
        checkpoint_every: steps; 0: only at the end, when stopped or where something raises.
        shown: the metrics on the bar, by the names they have there.
        description: of the bar.
        evaluation: what is measured as the training goes.
        train_step: instead of the trainer's.
    """
    from tqdm import tqdm

    step = trainer.train_step if train_step is None else train_step

    def measure() -> None:
        if evaluation is not None:
            evaluation.after_step(trainer, trainer.total_steps == total_steps)

    def stagnates() -> bool:
        return evaluation is not None and evaluation.stagnates

    with (
        StopRequest().listening() as stop,
        tqdm(total=total_steps, initial=trainer.total_steps, desc=description) as bar,
    ):
        if trainer.total_steps:
            measure()  # where that of the last step raised
        while trainer.total_steps < total_steps and not stop.came and not stagnates():
            with _kept(trainer, checkpoint):
                metrics = step(**batches[trainer.total_steps])
                bar.set_postfix({name: f"{metrics[key]:.3f}" for name, key in shown.items()})
                bar.update()
                measure()
            if checkpoint_every and trainer.total_steps % checkpoint_every == 0:
                checkpoint.save(trainer)
        checkpoint.save(trainer)
    return trainer.total_steps >= total_steps or stagnates()


@contextmanager
def _kept(trainer: TrainingLoop, checkpoint: Checkpoint) -> Iterator[None]:
    """Saves the whole steps made so far where what is done within this context raises."""
    steps, random = trainer.total_steps, random_state(trainer.device)
    try:
        yield
    except Exception:
        if trainer.total_steps > checkpoint.steps and not trainer.is_mid_step:
            if trainer.total_steps == steps:  # what it drew it draws again
                set_random_state(random, trainer.device)
            with suppress(Exception):  # the first error tells more
                checkpoint.save(trainer)
        raise
