"""The command `apt-model pretrain-mlm`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.options import DocumentOptions
from .arguments import check_at_least
from .groups import ModelOptions, PrecisionOptions
from .options import FILES, RunOptions, TrainingOptions, default_of

if TYPE_CHECKING:
    from ..data.lengths import LengthLimit
    from .job import Job

SHOWN = {"loss": "total_loss", "accuracy": "mlm_accuracy"}


@dataclass(kw_only=True)
class MLMRunOptions(RunOptions):
    """Run."""

    data: tuple[Path, ...] = field(
        metadata={
            **FILES,
            "metavar": "FILE",
            "help": "a text a line (with --nsp also a sentence a line, and a blank line between "
            "documents), or rows with the string text: JSON lines, JSON, CSV, Parquet, or a "
            "folder of datasets; also several",
        }
    )


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
    text: DocumentOptions
    training: MLMTrainingOptions
    masks: MaskOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from apt_kernels import never_words  # takes seconds, --help need not wait

    from ..data.order import ShuffledBatches
    from ..pretraining import create_mlm_pretrainer
    from ..scoring.loading import masked_model_kind
    from .job import Job, pretrained, shares, trainer_options
    from .models import trained_part, without_pooler, wrapped
    from .pretraining import evaluate, load_heads, save_mlm, tokenizer_with_mask
    from .texts import TEXT_LENGTH, counted, length_limit

    masks, training, run = options.masks, options.training, options.run
    tokenizer = tokenizer_with_mask(options)
    limit = length_limit(options, tokenizer, TEXT_LENGTH)
    counts: Counter[str] = Counter()
    of_held_out: Counter[str] = Counter()
    data = _load(options, tokenizer, limit, counts)
    held_out = _load(options, tokenizer, limit, of_held_out, True) if run.eval_data else None
    batches = ShuffledBatches(
        len(data), training.batch_size, training.seed, data, share=shares(training)
    )
    if masks.nsp:
        data.per_epoch = batches.per_epoch
    kind = masked_model_kind(options.model.model, masks.nsp)
    model = pretrained(options, kind)
    model = trained_part(options, model if masks.nsp else without_pooler(model), wrap=False)
    rows = model.get_input_embeddings().num_embeddings
    embedding = model.get_input_embeddings()
    trainer = create_mlm_pretrainer(
        wrapped(options, model),
        model.config.hidden_size,
        mask_prob=masks.mask_prob,
        use_nsp=masks.nsp,
        vocab_size=rows,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        special_token_ids=never_words(tokenizer, rows),
        lm_head=embedding if kind == "AutoModel" else None,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=0,  # the schedule has it
        seed=training.seed,
        **trainer_options(options, batches),
    )
    load_heads(trainer, options.model.model)
    return Job(
        trainer,
        batches,
        SHOWN,
        partial(evaluate, trainer, held_out, training.batch_size) if held_out else None,
        key="total_loss",
        higher_is_better=False,
        save=partial(save_mlm, trainer, tokenizer, options),
        tokenizer=tokenizer,
        counts=counted(counts, of_held_out),
    )


def _load(
    options: Options,
    tokenizer: Any,
    limit: LengthLimit,
    counts: Counter[str],
    held_out: bool = False,
) -> Any:
    """Returns the sequences to train on, or the held-out ones."""
    from ..data.sentences import segments
    from ..data.texts import MaskedTexts, SentencePairs, load_documents, load_texts, only_special
    from .texts import reading

    masks = options.masks
    paths = options.run.eval_data if held_out else options.run.data
    told = reading(options, counts, held_out)
    if not masks.nsp:
        rows = load_texts(paths, pairs=False, usable=only_special(tokenizer), **told)
        counts["texts"] = len(rows)
        return MaskedTexts(
            rows, tokenizer, limit, masks.whole_word, options.text.long_texts, counts
        )
    documents = load_documents(paths, **told)
    counts["texts"] = len(documents)
    parts = [segments(document, masks.segment_sentences) for document in documents]
    seed = options.training.seed - held_out
    return SentencePairs(parts, tokenizer, limit, seed, counts=counts)
