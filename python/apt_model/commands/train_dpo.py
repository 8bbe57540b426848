"""The command `apt-model train-dpo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.options import TextOptions
from .groups import PolicyModelOptions, PrecisionOptions
from .options import FILES, RunOptions, TrainingOptions, default_of

if TYPE_CHECKING:
    from .job import Job

SHOWN = {"loss": "loss", "accuracy": "accuracy", "margin": "reward_margin"}
PAIRS = (
    "rows with prompt, chosen and rejected, strings or lists of messages: JSON lines, JSON, CSV, "
    "Parquet, or a folder of datasets; also several"
)


@dataclass(kw_only=True)
class PairRunOptions(RunOptions):
    """Run."""

    data: tuple[Path, ...] = field(metadata={**FILES, "metavar": "FILE", "help": PAIRS})


@dataclass(kw_only=True)
class DPOTrainingOptions(TrainingOptions):
    """Training."""

    learning_rate: float = default_of(
        TrainingOptions, "learning_rate", 1e-6, recommended=(1e-6, 1e-5)
    )


@dataclass(kw_only=True)
class DPOOptions:
    """Loss."""

    beta: float = field(
        default=0.1, metadata={"help": "pull to the reference", "recommended": (0.05, 0.5)}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "probability that a preference is wrong", "recommended": (0, 0.1)},
    )
    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": "sigmoid (Rafailov et al. 2023), robust, hinge, ipo, exo_pair, nca_pair, "
            "bco_pair, sppo_hard, apo_zero, apo_down, discopop, simpo, orpo, aot, aot_unpaired, "
            "sigmoid_norm or kto_pair, as apt_kernels.dpo_loss has them"
        },
    )
    reference_free: bool = field(default=False, metadata={"help": "compare with no reference"})
    reference_model: Path | None = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "reference; without it a frozen copy of the model",
        },
    )

    def check(self) -> None:
        """Raises for a folder that is not there."""
        if self.reference_model is not None and not self.reference_model.is_dir():
            raise FileNotFoundError(f"{self.reference_model} is not a folder")


@dataclass(kw_only=True)
class Options:
    """Train a causal language model on preference pairs by direct preference optimization.

    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: PairRunOptions
    model: PolicyModelOptions
    text: TextOptions
    training: DPOTrainingOptions
    loss: DPOOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..rl import DPOConfig, create_dpo_trainer  # takes seconds, --help need not wait
    from .job import Job, pretrained, trainer_options
    from .models import reference_of, save_pretrained, trained_part
    from .pairs import batches_of_pairs, load_all_pairs, measure_of
    from .samples import Samples
    from .texts import PAIR_LENGTH, length_limit

    loss, training = options.loss, options.training
    tokenizer = pretrained(options, "AutoTokenizer")
    limit = length_limit(options, tokenizer, PAIR_LENGTH)
    pairs, held_out, counts = load_all_pairs(options, tokenizer, limit)
    batches = batches_of_pairs(options, pairs)
    model = trained_part(options, pretrained(options, "AutoModelForCausalLM"))
    config = DPOConfig(
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        loss_type=loss.loss_type,
        reference_free=loss.reference_free,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
    )
    reference = reference_of(options, loss.reference_model, config.has_reference)
    trainer = create_dpo_trainer(
        model,
        reference,
        config,
        router_aux_loss_coef=options.model.router_aux_loss_coef,
        **trainer_options(options, batches),
    )
    prompts = [pair.prompt for pair in held_out or pairs]
    return Job(
        trainer,
        batches,
        SHOWN,
        measure_of(trainer, held_out, options),
        key="loss",
        higher_is_better=False,
        save=save_pretrained(trainer.policy_model, tokenizer, options),
        tokenizer=tokenizer,
        samples=Samples(trainer.policy_model, tokenizer, prompts),
        counts=counts,
        inputs={"reference_model": loss.reference_model} if loss.reference_model else {},
    )
