"""The command `apt-model train-reward-model`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..data.options import TextOptions
from .groups import CausalModelOptions, PrecisionOptions
from .options import TrainingOptions, default_of
from .train_dpo import SHOWN, PairRunOptions

if TYPE_CHECKING:
    from .job import Job

NOT_TAKEN = ("prompt_lengths", "chosen_response_mask", "rejected_response_mask")


@dataclass(kw_only=True)
class RewardTrainingOptions(TrainingOptions):
    """Training."""

    learning_rate: float = default_of(
        TrainingOptions,
        "learning_rate",
        1e-5,
        help="learning rate of AdamW; recommended 1e-6-1e-5, of a head alone 1e-4-1e-2",
    )


@dataclass(kw_only=True)
class RewardModelOptions:
    """Reward model."""

    pooling: Literal["own", "last", "mean", "max"] = field(
        default="own",
        metadata={
            "help": "what of a text is scored: own, as the model's class for classification does, "
            "whose folder transformers, TRL and vLLM load; or the last, mean or max of the tokens"
        },
    )
    head_layers: int = field(
        default=1,
        metadata={"help": "linear layers of the head; with more than 1 the head is our own"},
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout between the layers"})
    margin: float = field(default=0.0, metadata={"help": "by how much chosen answers are better"})
    center_coef: float = field(
        default=0.0,
        metadata={
            "help": "weight of the term that keeps rewards around 0; recommended 0-0.01",
        },
    )


@dataclass(kw_only=True)
class Options:
    """Train a reward model, a base model and a head that scores texts, on preference pairs.

    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: PairRunOptions
    model: CausalModelOptions
    text: TextOptions
    training: RewardTrainingOptions
    reward: RewardModelOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..rl import RewardModelTrainer
    from .job import Job, pretrained, trainer_options
    from .models import wrapped
    from .pairs import batches_of_pairs, load_all_pairs, measure_of
    from .reward_folder import make_reward_model, save_reward_model
    from .texts import PAIR_LENGTH, length_limit

    reward, training = options.reward, options.training
    tokenizer = pretrained(options, "AutoTokenizer")
    limit = length_limit(options, tokenizer, PAIR_LENGTH)
    pairs, held_out, counts = load_all_pairs(options, tokenizer, limit)
    batches = batches_of_pairs(options, pairs, NOT_TAKEN)
    model = make_reward_model(options, tokenizer)
    trainer = RewardModelTrainer(
        wrapped(options, model),
        margin=reward.margin,
        center_coef=reward.center_coef,
        router_aux_loss_coef=options.model.router_aux_loss_coef,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **trainer_options(options, batches),
    )
    text = replace(options.text, max_length=limit.tokens)
    return Job(
        trainer,
        batches,
        SHOWN,
        measure_of(trainer, held_out, options, NOT_TAKEN),
        key="loss",
        higher_is_better=False,
        save=partial(
            save_reward_model,
            model,
            tokenizer,
            text,
            reward.head_layers,
            merge_adapter=options.model.merge_adapter,
        ),
        tokenizer=tokenizer,
        counts=counts,
    )
