"""The command `apt-model evaluate`."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import check_at_least, command_of, read_options


@dataclass(kw_only=True)
class EvaluateOptions:
    """Run and rows."""

    run: Path = field(
        metadata={"metavar": "FOLDER", "help": "output folder of a training command that finished"}
    )
    eval_data: tuple[Path, ...] = field(
        metadata={"names": ("--eval",), "metavar": "PATH", "help": "rows to measure"}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "rows measured at once; without it as in the run"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, …; without it a GPU if there is one"}
    )

    def check(self) -> None:
        """Raises where there is no trained run, or no such file."""
        check_at_least(self, 1, "batch_size")
        if not (self.run / "run.yaml").is_file() or not (self.run / "model").is_dir():
            raise FileNotFoundError(f"{self.run} holds no run.yaml and model of a finished run")
        for path in self.eval_data:
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")


@dataclass(kw_only=True)
class Options:
    """Measure a trained model on other rows, with the figures that its training had.

    What a policy is compared with is the model that its training began with.
    """

    rows: EvaluateOptions


def run(options: Options) -> int:
    """Prints the figures as JSON."""
    from ..training import processes

    given = options.rows
    file = given.run / "run.yaml"
    command = command_of(file)
    module = importlib.import_module(f"{__package__}.{command.replace('-', '_')}")
    of_run = read_options(command, module.Options, [f"--config={file}"])
    of_run.run.data = of_run.run.eval_data = given.eval_data
    of_run.run.device = str(processes.begin(given.device, of_run.run.process_timeout))
    of_run.training.batch_size = given.batch_size or of_run.training.batch_size
    _begin_with_the_trained(of_run, given.run / "model")
    figures = module.make_job(of_run).measure()
    print(json.dumps({"command": command, **figures}, indent=2))
    return 0


def _begin_with_the_trained(options: Any, folder: Path) -> None:
    loss = getattr(options, "loss", None)
    if getattr(loss, "reference_model", "") is None and options.model.gguf_file is None:
        loss.reference_model = options.model.model
    options.model.model, options.model.gguf_file = folder, None
