"""The command `apt-model pretrain-mlm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import check_at_least
from .groups import ModelOptions, PrecisionOptions
from .options import RunOptions, TrainingOptions, default_of

if TYPE_CHECKING:
    from .job import Job

SHOWN = {"loss": "total_loss", "accuracy": "mlm_accuracy"}


@dataclass(kw_only=True)
class MLMRunOptions(RunOptions):
    """Run."""

    data: Path = field(
        metadata={"metavar": "FILE", "help": "a text a line, or JSON lines with the string text"}
    )


@dataclass(kw_only=True)
class MLMTextOptions:
    """Text."""

    max_length: int = field(default=128, metadata={"help": "tokens of a text; cut beyond"})

    def check(self) -> None:
        """Raises for numbers that cannot be."""
        check_at_least(self, 1, "max_length")


@dataclass(kw_only=True)
class MLMTrainingOptions(TrainingOptions):
    """Training."""

    learning_rate: float = default_of(TrainingOptions, "learning_rate", 5e-5)
    weight_decay: float = default_of(TrainingOptions, "weight_decay", 0.01)
    batch_size: int = default_of(TrainingOptions, "batch_size", 32)


@dataclass(kw_only=True)
class MaskOptions:
    """Masks."""

    mask_prob: float = field(
        default=0.15, metadata={"help": "share of the tokens that are predicted"}
    )
    whole_word: bool = field(default=False, metadata={"help": "mask whole words"})
    nsp: bool = field(
        default=False,
        metadata={"help": "also predict whether one segment of a text follows another"},
    )
    segment_sentences: int = field(
        default=3, metadata={"metavar": "N", "help": "sentences of a segment"}
    )

    def check(self) -> None:
        """Raises for what cannot be, alone or together."""
        check_at_least(self, 1, "segment_sentences")
        if self.nsp and self.whole_word:
            raise ValueError("--whole-word masks single texts: it cannot be used with --nsp")


@dataclass(kw_only=True)
class Options:
    """Train an encoder to predict masked tokens (BERT).

    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: MLMRunOptions
    model: ModelOptions
    text: MLMTextOptions
    training: MLMTrainingOptions
    masks: MaskOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..data.order import ShuffledBatches  # takes seconds, --help need not wait
    from ..pretraining import create_mlm_pretrainer
    from .job import Job, pretrained, shares, trainer_options
    from .models import trained_part, without_pooler, wrapped
    from .pretraining import evaluate, save_mlm, tokenizer_with_mask, without_token

    masks, training, run = options.masks, options.training, options.run
    tokenizer = tokenizer_with_mask(options)
    data = _load(options, tokenizer, run.data, training.seed)
    held_out = run.eval_data and _load(options, tokenizer, run.eval_data, training.seed - 1)
    batches = ShuffledBatches(
        len(data), training.batch_size, training.seed, data, share=shares(training)
    )
    if masks.nsp:
        data.per_epoch = batches.per_epoch
    model = trained_part(options, pretrained(options, "AutoModel"), wrap=False)
    rows = model.get_input_embeddings().num_embeddings
    embedding = model.get_input_embeddings()
    trainer = create_mlm_pretrainer(
        wrapped(options, model if masks.nsp else without_pooler(model)),
        model.config.hidden_size,
        mask_prob=masks.mask_prob,
        use_nsp=masks.nsp,
        vocab_size=rows,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        special_token_ids=[*tokenizer.all_special_ids, *without_token(tokenizer, rows)],
        lm_head=embedding,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=0,  # the schedule has it
        seed=training.seed,
        **trainer_options(options, batches),
    )

    return Job(
        trainer,
        batches,
        SHOWN,
        partial(evaluate, trainer, held_out, training.batch_size) if held_out else None,
        key="total_loss",
        higher_is_better=False,
        save=partial(save_mlm, trainer, tokenizer),
        tokenizer=tokenizer,
        counts={"texts": len(data), "held_out_texts": len(held_out) if held_out else 0},
    )


def _load(options: Options, tokenizer: Any, path: Path, seed: int) -> Any:
    from ..data.texts import MaskedTexts, SentencePairs, Text, load_texts, segments
    from .pretraining import only_special

    masks = options.masks
    read = partial(load_texts, path, fail_on_bad_row=options.run.bad_rows == "fail")
    if not masks.nsp:
        rows = read(usable=partial(only_special, tokenizer))
        return MaskedTexts(rows, tokenizer, options.text.max_length, masks.whole_word)

    def split(text: Text) -> list[str]:
        return segments(text.text, masks.segment_sentences)

    rows = read(usable=lambda text: None if len(split(text)) > 1 else "has no two segments")
    return SentencePairs([split(row) for row in rows], tokenizer, options.text.max_length, seed)
