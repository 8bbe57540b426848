"""The options that every command which trains has: its files, its steps, its machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .arguments import check_at_least, option_name

FILES = {"replaced_again": True}  # a flag that comes again replaces the files before
KEPT = {"decides": False}  # an option that may change when a run is continued


@dataclass(kw_only=True)
class RunOptions:
    """Run."""

    data: tuple[Path, ...] = field(
        metadata={**FILES, "metavar": "PATH", "help": "rows to train on"}
    )
    output: Path | None = field(
        default=None,
        metadata={
            **KEPT,
            "metavar": "FOLDER",
            "help": "checkpoint.pt, curves.png, summary.json, run.yaml and the trained model go "
            "here; without it out/NAME",
        },
    )
    eval_data: tuple[Path, ...] = field(
        default=(),
        metadata={
            **KEPT,
            **FILES,
            "names": ("--eval",),
            "metavar": "PATH",
            "help": "held-out rows, measured as training goes; the best state is kept",
        },
    )
    eval_every: int = field(
        default=100,
        metadata={**KEPT, "metavar": "STEPS", "help": "steps between measurements; 0: at the end"},
    )
    patience: int = field(
        default=0,
        metadata={
            **KEPT,
            "metavar": "N",
            "help": "stop after N measurements without a better one; 0: never",
        },
    )
    checkpoint_every: int = field(
        default=100,
        metadata={
            **KEPT,
            "metavar": "STEPS",
            "help": "steps between checkpoints; 0: only at the end, when stopped or at an error",
        },
    )
    resume: Literal["last", "previous"] = field(
        default="last",
        metadata={
            **KEPT,
            "help": "the checkpoint that the run continues from; previous: the one before the "
            "last, where the last is damaged",
        },
    )
    restart: bool = field(
        default=False,
        metadata={
            **KEPT,
            "help": "begin anew: what an earlier run left in the output folder is removed after "
            "the first step, its model when this one's is saved",
        },
    )
    bad_rows: Literal["skip", "fail"] = field(
        default="skip",
        metadata={
            **KEPT,
            "help": "of rows that cannot be used: skip names the lines of the first 20 and counts "
            "the others, fail names that of the first and ends",
        },
    )
    device: str | None = field(
        default=None,
        metadata={**KEPT, "help": "cpu, cuda, …; without it a GPU if there is one"},
    )
    fsdp: bool = field(
        default=False,
        metadata={
            "help": "of several processes (torchrun): share out parameters, gradients and the "
            "optimizer's state (FSDP2); without it each has a copy (DDP)",
        },
    )
    process_timeout: float = field(
        default=1800.0,
        metadata={
            **KEPT,
            "metavar": "SECONDS",
            "help": "of several processes: the run ends where one waits longer for another",
        },
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "csv"], ...] = field(
        default=(),
        metadata={
            **KEPT,
            "help": "also tell the figures of each step to these: tensorboard, wandb, mlflow, csv",
        },
    )
    tensorboard: Path | None = field(
        default=None,
        metadata={
            **KEPT,
            "metavar": "FOLDER",
            "help": "folder of --report-to tensorboard; without it tensorboard/ in --output",
        },
    )
    samples: int = field(
        default=0,
        metadata={
            **KEPT,
            "metavar": "N",
            "help": "write to samples.jsonl what the model answers to N prompts, of --eval or else "
            "of --data, before, during (at each --eval-every) and after the training",
        },
    )
    sample_tokens: int = field(
        default=64, metadata={**KEPT, "help": "tokens of such an answer, at most"}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            **KEPT,
            "help": "only say what would be done: counts, lengths, first rows as tokens, memory",
        },
    )

    def check(self) -> None:
        """Raises for numbers that cannot be, and for files that are not there."""
        check_at_least(self, 0, "eval_every", "patience", "checkpoint_every", "samples")
        check_at_least(self, 1, "sample_tokens")
        if self.patience and not self.eval_data:
            raise ValueError("--patience needs --eval")
        for path in (*self.data, *self.eval_data):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")


@dataclass(kw_only=True)
class TrainingOptions:
    """Training."""

    learning_rate: float = field(default=1e-5, metadata={"help": "learning rate of AdamW"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay of AdamW; norms and biases are left alone"}
    )
    decay_norms_and_biases: bool = field(
        default=False, metadata={"help": "weight decay moves norms and biases too"}
    )
    max_grad_norm: float | None = field(
        default=1.0, metadata={"help": "gradients are clipped to this norm; none: they are not"}
    )
    epochs: int = field(
        default=1, metadata={**KEPT, "help": "passes over the data; a finished run goes on to more"}
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            **KEPT,
            "metavar": "STEPS",
            "help": "train exactly so many steps, over as many epochs as that takes",
        },
    )
    batch_size: int = field(default=8, metadata={"help": "rows a step, over all processes"})
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "parts a step is computed in: less memory, the same update"},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={**KEPT, "help": "compute activations twice: less memory, the same update"},
    )
    schedule: str = field(
        default="constant",
        metadata={
            "metavar": "NAME",
            "help": "how the learning rate goes after the warm-up: constant, linear, cosine, "
            "cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, "
            "warmup_stable_decay, as transformers.get_scheduler has them",
        },
    )
    schedule_options: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "NAME=NUMBER",
            "help": "options of that schedule, such as min_lr_rate=0.1 or num_cycles=2",
        },
    )
    warmup_steps: int = field(
        default=0,
        metadata={"help": "steps over which the learning rate rises; recommended 5-10% of all"},
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "instead: the warm-up's share of all steps"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the order of the rows and of all that is random"}
    )

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "epochs", "batch_size", "gradient_accumulation_steps", "max_steps")
        check_at_least(self, 0, "warmup_steps", "warmup_ratio", "weight_decay", "learning_rate")
        if self.warmup_ratio is not None and (self.warmup_steps or self.warmup_ratio > 1):
            raise ValueError(
                f"--warmup-ratio must be at most 1, and not with --warmup-steps, "
                f"got {self.warmup_ratio}"
            )
        self.read_schedule_options()

    def read_schedule_options(self) -> dict[str, float]:
        """Returns the options of the schedule by name."""
        read = {}
        for option in self.schedule_options:
            name, _, value = option.partition("=")
            try:
                number = float(value)
            except ValueError:
                flag = option_name("schedule_options")
                raise ValueError(f"{flag}: expected NAME=NUMBER, got {option!r}") from None
            read[name] = int(number) if number.is_integer() else number
        return read


def default_of(group: Any, name: str, default: Any, **metadata: Any) -> Any:
    """Returns the field `name` of a group with another default, for a group derived from it."""
    inherited = group.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**inherited, **metadata})
