"""The numbers of a training run by step, and their picture."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .files import write_whole


class Curves:
    """Columns of numbers, one value a step (8 bytes each), of which NaN means: not measured."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {}
        self.length = 0

    def append(self, record: Mapping[str, float]) -> None:
        """Adds one step."""
        for name, value in record.items():
            column = self.columns.setdefault(name, array("d", [float("nan")] * self.length))
            column.append(value)
        self.length += 1
        for column in self.columns.values():
            if len(column) < self.length:
                column.append(float("nan"))

    def annotate(self, values: Mapping[str, float]) -> None:
        """Gives the last step more values."""
        for name, value in values.items():
            column = self.columns.setdefault(name, array("d", [float("nan")] * self.length))
            column[-1] = value

    def last(self) -> dict[str, float]:
        """Returns what the last step has; nothing before the first one."""
        if not self.length:
            return {}
        record = {name: column[-1] for name, column in self.columns.items()}
        return {name: value for name, value in record.items() if not math.isnan(value)}

    def as_lists(self) -> dict[str, list[float | None]]:
        """Returns the columns as JSON can hold them, None where nothing was measured."""
        return {
            name: [None if math.isnan(value) else value for value in column]
            for name, column in self.columns.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the columns as float64 tensors."""
        return {
            name: torch.tensor(column.tolist(), dtype=torch.float64)
            for name, column in self.columns.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the columns by the columns that `state_dict()` gave."""
        self.columns = {name: array("d", column.tolist()) for name, column in state.items()}
        self.length = max((len(column) for column in self.columns.values()), default=0)

    def save_png(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Draws one panel a column over the column `step` into one PNG file, written atomically.

        Args:
            path: where to write; the folder is made where it is missing.
            names: the columns to draw, in order; None: all but `step`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is nothing to draw, or a column that was never recorded.
        """
        names = [name for name in self.columns if name != "step"] if names is None else list(names)
        unknown = [name for name in names if name not in self.columns]
        if unknown or not names:
            raise ValueError(
                f"no curves of {unknown or 'any step'}; recorded: {list(self.columns)}"
            )
        figure = self._figure(names)
        write_whole(Path(path), lambda file: figure.savefig(file, format="png", dpi=120))

    def _figure(self, names: list[str]) -> Any:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # a canvas of its own: no global state, no display needed
        steps = self.columns.get("step", range(self.length))
        for index, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, index + 1)
            pairs = zip(steps, self.columns[name], strict=True)
            known = [pair for pair in pairs if not math.isnan(pair[1])]  # one line through them
            axes.plot(*zip(*known, strict=True), linewidth=1, marker=".", markersize=3)
            axes.set_title(name.replace("_", " "), fontsize=10)
            axes.set_xlabel("step", fontsize=8)
            axes.grid(alpha=0.3)
        return figure


def read_numbers(values: Mapping[str, Tensor], groups: Sequence[Any] = ()) -> dict[str, float]:
    """Returns 0-dim tensors, summed over the process groups, as numbers: one read of the device."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    for group in groups:
        dist.all_reduce(stacked, group=group)
    return dict(zip(values, stacked.tolist(), strict=True))
