"""The command `apt-model evaluate`."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import check_at_least, command_of, read_options

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"


@dataclass(kw_only=True)
class EvaluateOptions:
    """Run and rows."""

    run: Path = field(metadata={"metavar": "FOLDER", "help": "output folder of a training command"})
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
        for name in ("run.yaml", CHECKPOINT):
            if not (self.run / name).is_file():
                raise FileNotFoundError(f"{self.run} holds no {name}: it is no run of a command")
        for path in self.eval_data:
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")


@dataclass(kw_only=True)
class Options:
    """Measure a trained model on other rows, with the figures that its training had.

    The model is made as the training made it, and gets the best state, or the last where nothing
    was measured. So a policy is compared with what its training began with.
    """

    rows: EvaluateOptions


def run(options: Options) -> int:
    """Prints the figures as JSON."""
    from ..training import processes
    from ..training.files import load_tensors

    given = options.rows
    file = given.run / "run.yaml"
    command = command_of(file)
    module = importlib.import_module(f"{__package__}.{command.replace('-', '_')}")
    of_run = read_options(command, module.Options, [f"--config={file}"])
    of_run.run.data = of_run.run.eval_data = given.eval_data
    of_run.run.device = str(processes.begin(given.device, of_run.run.process_timeout))
    of_run.training.batch_size = given.batch_size or of_run.training.batch_size
    job = module.make_job(of_run)
    best = given.run / BEST
    if best.exists():
        state = load_tensors(best)
    else:
        state = load_tensors(given.run / CHECKPOINT)["trainer"]
    job.trainer.load_modules(state["modules"])
    print(json.dumps({"command": command, **job.measure()}, indent=2))
    return 0
