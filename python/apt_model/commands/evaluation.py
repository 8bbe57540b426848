"""Held-out figures as a training goes: the best state is kept, and a run that stagnates ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..training import processes
from ..training.files import load_tensors, save_tensors
from ..training.loop import TrainingLoop
from ..training.state import whole

SEED = 0


class Evaluation:
    """Measures every so many steps, always with the same random numbers, which training never sees.

    Args:
        measure: returns the figures.
        key: the figure that decides.
        higher_is_better: of that figure.
        every: steps; 0: only at the end.
        patience: the run ends after so many measurements without a better one; 0: never.
        path: of the file that holds the best state, until the checkpoint holds the same.
        rows: hash of the held-out rows: measurements of others are not compared with these.
    """

    def __init__(
        self,
        measure: Callable[[], Mapping[str, float]],
        key: str,
        higher_is_better: bool,
        every: int,
        patience: int,
        path: Path,
        rows: str = "",
    ) -> None:
        self._measure = measure
        self.key = key
        self._sign = 1.0 if higher_is_better else -1.0
        self._every = every
        self._patience = patience
        self.path = path
        self.rows = rows
        self.before: dict[str, float] = {}
        self.records: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.best_is_saved = False  # as the model of the finished run that goes on

    def start(self, saved: Mapping[str, float] | None = None) -> None:
        """Measures once before the first step; a continued run has done so.

        Args:
            saved: the figures of the model that the run has saved, where it was finished before.

        Raises:
            FileNotFoundError: the best state of the run that is continued is not there any more.
        """
        if not self.before:
            self.before = self._measured()
        elif self.best and self.best == saved and not self.path.exists():
            self.best_is_saved = True
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
            modules = whole(trainer.state_dict(include_frozen=False)["modules"])
            best = {"measured": measured, "modules": modules}
            processes.on_main(lambda: save_tensors(self.path, best))
            self.best, self.best_is_saved = measured, False
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
        if processes.is_main():
            self.path.unlink(missing_ok=True)

    def _read_best(self) -> dict[str, Any]:
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} is missing: until the model is saved it holds the best state, that "
                f"of step {self.best['step']}; start anew (--restart)"
            )
        return load_tensors(self.path)

    def _measured(self) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return dict(self._measure())

    def state_dict(self) -> dict[str, Any]:
        """Returns what was measured."""
        return {
            "rows": self.rows,
            "before": self.before,
            "records": self.records,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`; measurements of other rows are left out."""
        if state["rows"] == self.rows:
            self.before, self.records = state["before"], state["records"]
            self.best = state["best"]


def mean_over_rows(
    rows: Sequence[Any],
    batch_size: int,
    measure: Callable[[list[Any]], Mapping[str, float]],
    at_least: int = 1,
    weights: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Returns the means over rows of what `measure` returns of batches of them; nothing for none.

    The processes of a run share every batch.

    Args:
        rows: held-out rows, or their numbers.
        batch_size: rows measured at once, at most.
        measure: returns figures of a batch of all processes; the batches are of nearly one size.
        at_least: rows a batch needs, as a contrastive loss of one row alone is 0.
        weights: the figure that counts, instead of the rows, in the mean of those figures whose
            names begin so.
    """
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    parts = max(1, min(-(-len(rows) // batch_size), len(rows) // at_least)) if rows else 0
    for part in range(parts):
        start, stop = (bound * len(rows) // parts for bound in (part, part + 1))
        figures = measure(processes.share(rows[start:stop]))
        for name, value in figures.items():
            weight = _weight_of(name, weights or {}, figures)
            count = stop - start if weight is None else figures[weight]
            totals[name] = totals.get(name, 0.0) + value * count
            counts[name] = counts.get(name, 0.0) + count
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


def _weight_of(name: str, weights: Mapping[str, str], figures: Mapping[str, float]) -> str | None:
    """Returns the figure that counts in the mean of the figure `name`, None for the rows."""
    found = (weight for start, weight in weights.items() if name.startswith(start))
    return next((weight for weight in found if weight in figures), None)
