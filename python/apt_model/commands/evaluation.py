"""Held-out figures as a training goes: the best state is kept, and a run that stagnates ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..training.files import save_tensors
from ..training.loop import TrainingLoop

SEED = 0


class Evaluation:
    """Measures every so many steps, always with the same random numbers, which training never sees.

    Args:
        measure: returns the figures.
        key: the figure that decides.
        higher_is_better: of that figure.
        every: steps; 0: only at the end.
        patience: the run ends after so many measurements without a better one; 0: never.
        path: of the file that holds the best state while training goes on.
    """

    def __init__(
        self,
        measure: Callable[[], Mapping[str, float]],
        key: str,
        higher_is_better: bool,
        every: int,
        patience: int,
        path: Path,
    ) -> None:
        self._measure = measure
        self.key = key
        self._sign = 1.0 if higher_is_better else -1.0
        self._every = every
        self._patience = patience
        self.path = path
        self.before: dict[str, float] = {}
        self.records: list[dict[str, float]] = []
        self.best: dict[str, float] = {}

    def start(self) -> None:
        """Measures once before the first step; a continued run has done so.

        Raises:
            FileNotFoundError: the best state of the run that is continued is not there any more.
        """
        if not self.before:
            self.before = self._measured()
        elif self.best:  # the file may hold that of a later step than the checkpoint
            self.best = self._read_best()["measured"]

    def after_step(self, trainer: TrainingLoop, is_last: bool) -> None:
        """Measures where it is time, and writes the state where it is the best so far.

        Does nothing where this step was measured; where it raises, it can be called again.
        """
        step = trainer.total_steps
        if not is_last and not (self._every and step % self._every == 0):
            return
        if self.records and self.records[-1]["step"] == step:
            return
        measured = {"step": step, **self._measured()}
        if not self.best or self._sign * (measured[self.key] - self.best[self.key]) > 0:
            modules = trainer.state_dict(include_frozen=False)["modules"]
            save_tensors(self.path, {"measured": measured, "modules": modules})
            self.best = measured
        self.records.append(measured)
        trainer.curves.annotate({f"held_out_{k}": v for k, v in measured.items() if k != "step"})

    @property
    def stagnates(self) -> bool:
        """Whether the last `patience` measurements were not better than one before."""
        if not self._patience or not self.best:
            return False
        return sum(r["step"] > self.best["step"] for r in self.records) >= self._patience

    def load_best(self, trainer: TrainingLoop) -> None:
        """Gives the trainer's modules the best state; its file stays until `forget_best`."""
        trainer.load_modules(self._read_best()["modules"])

    def forget_best(self) -> None:
        """Removes the file of the best state."""
        self.path.unlink(missing_ok=True)

    def _read_best(self) -> dict[str, Any]:
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} is missing: until the model is saved it holds the best state, that "
                f"of step {self.best['step']}; start anew (--restart)"
            )
        return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)

    def _measured(self) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return dict(self._measure())

    def state_dict(self) -> dict[str, Any]:
        """Returns what was measured."""
        return {"before": self.before, "records": self.records, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`."""
        self.before, self.records, self.best = state["before"], state["records"], state["best"]
