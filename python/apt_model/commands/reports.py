"""Where the figures of each step go besides `summary.json`: TensorBoard, W&B, MLflow, CSV."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..training.curves import Curves
from ..training.files import write_whole
from .options import RunOptions

IDS = "report-ids.json"
Record = Mapping[str, float]


class Reports:
    """The reports of one run; each is told every step once, also of a run that is continued.

    Args:
        run: names the reports and the output folder.
        curves: what was recorded so far; the last record is reported.
        settings: what the run is, for those that show it.
    """

    def __init__(self, run: RunOptions, curves: Curves, settings: Mapping[str, Any]) -> None:
        assert run.output is not None  # a run without a folder reports nothing
        self._curves, self._output = curves, run.output
        self._ids = _Ids(run.output / IDS, curves.length > 0)
        self._write: list[Callable[[Record], Any]] = []
        self._close: list[Callable[[], Any]] = []
        names = dict.fromkeys((*run.report_to, *(["tensorboard"] if run.tensorboard else [])))
        for name in names:
            getattr(self, f"_open_{name}")(run, settings)

    def __call__(self) -> None:
        """Reports the last step with what was measured after it."""
        record = self._curves.last()
        for write in self._write:
            write(record)

    def close(self) -> None:
        """Ends the reports."""
        for close in self._close:
            close()

    def _open_tensorboard(self, run: RunOptions, settings: Mapping[str, Any]) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard")
        folder = run.tensorboard or self._output / "tensorboard"
        writer = tensorboard.SummaryWriter(os.fspath(folder), purge_step=self._curves.length + 1)

        def write(record: Record) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, int(record["step"]))

        self._write.append(write)
        self._close.append(writer.close)

    def _open_wandb(self, run: RunOptions, settings: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        known = self._ids.get("wandb")
        board = wandb.init(
            project="apt-model", name=self._output.name, dir=os.fspath(self._output),
            config=dict(settings), id=known, resume="allow" if known else None,
        )  # fmt: skip
        self._ids.set("wandb", board.id)
        self._write.append(lambda record: board.log(dict(record), step=int(record["step"])))
        self._close.append(board.finish)

    def _open_mlflow(self, run: RunOptions, settings: Mapping[str, Any]) -> None:
        mlflow = _import("mlflow", "mlflow")
        known = self._ids.get("mlflow")
        begun = mlflow.start_run(run_id=known, run_name=self._output.name)
        self._ids.set("mlflow", begun.info.run_id)
        if known is None:
            mlflow.log_params(dict(settings))
        self._write.append(
            lambda record: mlflow.log_metrics(dict(record), step=int(record["step"]))
        )
        self._close.append(mlflow.end_run)

    def _open_csv(self, run: RunOptions, settings: Mapping[str, Any]) -> None:
        table = _Table(self._output / "metrics.csv", self._curves)
        self._write.append(table.write)


class _Table:
    """A CSV file of all steps: a line is added each step, the whole written for each new column."""

    def __init__(self, path: Path, curves: Curves) -> None:
        self._path, self._curves = path, curves
        self._columns: list[str] = []

    def write(self, record: Record) -> None:
        """Adds a step."""
        if list(self._curves.columns) != self._columns:
            self._columns = list(self._curves.columns)
            columns = self._curves.columns.values()
            rows = list(zip(*columns, strict=True))
            write_whole(self._path, lambda file: file.write_text(_lines(self._columns, *rows)))
            return
        row = [record.get(name, math.nan) for name in self._columns]
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_lines(row))


def _lines(*rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in row)
    return text.getvalue()


class _Ids:
    """The names that services gave to this run, so that a continued run is the same there."""

    def __init__(self, path: Path, is_continued: bool) -> None:
        self._path = path
        self._ids: dict[str, str] = {}
        if is_continued and path.exists():
            self._ids = json.loads(path.read_text())

    def get(self, name: str) -> str | None:
        """Returns what the service calls the run, None where it does not know it."""
        return self._ids.get(name)

    def set(self, name: str, value: str) -> None:
        """Keeps what the service calls the run."""
        self._ids[name] = value
        text = json.dumps(self._ids)
        write_whole(self._path, lambda file: file.write_text(text))


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--report-to {package} needs the package {package}: {error}") from None
