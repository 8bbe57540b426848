"""The command `apt-model pretrain-contrastive`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.files import is_text_path
from ..data.image_options import ImageOptions
from ..data.options import ContrastiveTextOptions
from ..data.rows import names_of
from .groups import ModelOptions, PrecisionOptions
from .options import FILES, RunOptions, TrainingOptions, default_of

if TYPE_CHECKING:
    from ..data.lengths import LengthLimit
    from .job import Job

SHOWN = {"loss": "loss", "accuracy": "accuracy"}


@dataclass(kw_only=True)
class ContrastiveRunOptions(RunOptions):
    """Run."""

    data: tuple[Path, ...] = field(
        metadata={
            **FILES,
            "metavar": "PATH",
            "help": "texts: .txt with one a line, or rows (JSON lines, JSON, CSV, Parquet, a "
            "folder of datasets) with the string text and, where there are such, positive and "
            "negative, also several; images: a folder, or an array .npy or .npz",
        }
    )

    def is_text(self) -> bool:
        """Returns whether the data are texts, by the suffixes."""
        return all(is_text_path(path) for path in self.data)

    def check(self) -> None:
        """Raises for numbers that cannot be, and for files that are not there."""
        super().check()
        if len(self.data) > 1 and not self.is_text():
            raise ValueError("--data: expected one folder or array of images, got several")


@dataclass(kw_only=True)
class EncoderOptions(ModelOptions):
    """Model."""

    model: Path | None = field(  # type: ignore[assignment]  # images need no folder
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "Hugging Face model folder; for images without it a small CNN",
        },
    )

    def check(self) -> None:
        """Raises as `ModelOptions`, and for an adapter without a model."""
        super().check()
        if self.model is None and self.has_adapter:
            raise ValueError(
                "--lora-rank needs --model: an adapter is saved without what it adapts"
            )


@dataclass(kw_only=True)
class ContrastiveTrainingOptions(TrainingOptions):
    """Training."""

    learning_rate: float = default_of(TrainingOptions, "learning_rate", 1e-4)
    weight_decay: float = default_of(TrainingOptions, "weight_decay", 1e-6)
    batch_size: int = default_of(TrainingOptions, "batch_size", 256)
    cache_chunk: int | None = field(
        default=None,
        metadata={
            "metavar": "ROWS",
            "help": "rows through the encoder at a time: less memory, the same update",
        },
    )


@dataclass(kw_only=True)
class ContrastiveOptions:
    """Loss."""

    method: Literal["simclr", "moco"] = field(
        default="simclr", metadata={"help": "where negatives come from"}
    )
    temperature: float = field(default=0.07, metadata={"help": "temperature; recommended 0.05-0.5"})
    projection_dim: int = field(default=128, metadata={"help": "width of what is compared"})
    hidden_dim: int = field(default=2048, metadata={"help": "width inside the projection head"})
    momentum: float = field(default=0.999, metadata={"help": "MoCo: of the second encoder"})
    queue_size: int = field(default=65536, metadata={"help": "MoCo: keys in the queue"})
    pooling: Literal["mean", "first"] = field(
        default="mean", metadata={"help": "how an embedding is made of the tokens"}
    )


@dataclass(kw_only=True)
class ViewOptions:
    """Views."""

    mask_prob: float = field(default=0.0, metadata={"help": "texts: share of masked tokens"})
    delete_prob: float = field(
        default=0.1, metadata={"help": "texts: share of tokens that are left out"}
    )
    swap_prob: float = field(
        default=0.0, metadata={"help": "texts: share of neighbours that change places"}
    )
    flip: bool = field(
        default=False, metadata={"help": "images: turn half of the views left to right"}
    )


@dataclass(kw_only=True)
class Options:
    """Train an encoder of texts or images to tell samples by two views (SimCLR, MoCo).

    Stopped by Ctrl-C and started again with the same options, it continues.
    """

    run: ContrastiveRunOptions
    model: EncoderOptions
    text: ContrastiveTextOptions
    images: ImageOptions
    views: ViewOptions
    training: ContrastiveTrainingOptions
    loss: ContrastiveOptions
    precision: PrecisionOptions


def make_job(options: Options) -> Job:
    """Returns what the command trains."""
    from ..data.order import ShuffledBatches  # takes seconds, --help need not wait
    from ..pretraining import create_contrastive_pretrainer
    from ..training import processes
    from ..training.batch_norm import synchronize
    from .images import read_processor
    from .job import Job, shares, trainer_options
    from .messages import say
    from .pretraining import evaluate, load_projection, save_encoder, tokenizer_with_mask
    from .texts import TEXT_LENGTH, counted, length_limit

    run, training, loss = options.run, options.training, options.loss
    if run.is_text() and options.model.model is None:
        raise ValueError("--model is needed to train on texts")
    tokenizer = limit = None
    if run.is_text():
        tokenizer = tokenizer_with_mask(options, needed=options.views.mask_prob > 0)
        limit = length_limit(options, tokenizer, TEXT_LENGTH)
    processor = None if run.is_text() else read_processor(options)
    counts: Counter[str] = Counter()
    of_held_out: Counter[str] = Counter()
    data = _load(options, tokenizer, processor, limit, counts)
    held_out = None
    if run.eval_data:
        held_out = _load(options, tokenizer, processor, limit, of_held_out, True)
    if held_out is not None and len(held_out) < 2:
        raise ValueError(
            f"{names_of(run.eval_data)} must hold two samples or more: one has no negatives"
        )
    batches = ShuffledBatches(
        len(data), training.batch_size, training.seed, data, whole=True, share=shares(training),
        groups=getattr(data, "groups", None),
    )  # fmt: skip
    if batches.left_out:
        say(
            f"{batches.left_out} rows repeat a text so often that an epoch leaves them out: no "
            "batch holds one text twice"
        )
    model, width = _encoder(options, data)
    trainer = create_contrastive_pretrainer(
        model,
        width,
        temperature=loss.temperature,
        projection_dim=loss.projection_dim,
        hidden_dim=loss.hidden_dim,
        use_momentum_encoder=loss.method == "moco",
        momentum=loss.momentum,
        queue_size=loss.queue_size,
        pooling=loss.pooling,
        cache_chunk=training.cache_chunk,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **trainer_options(options, batches),
    )
    load_projection(trainer, options.model.model)

    synchronize(trainer.modules())
    least = 2 * processes.count()  # a contrastive loss of one sample alone is 0
    measure = partial(evaluate, trainer, held_out, training.batch_size, least)
    return Job(
        trainer,
        batches,
        SHOWN,
        measure if held_out else None,
        key="loss",
        higher_is_better=False,
        save=partial(save_encoder, trainer, tokenizer, processor, options, limit and limit.tokens),
        tokenizer=tokenizer,
        counts={
            "samples": len(data),
            "held_out_samples": len(held_out) if held_out else 0,
            **counted(counts, of_held_out),
        },
    )


def _load(
    options: Options,
    tokenizer: Any,
    processor: Any,
    limit: LengthLimit | None,
    counts: Counter[str],
    held_out: bool = False,
) -> Any:
    """Returns the samples to train on, or the held-out ones."""
    from ..data.texts import TextViews, load_texts, only_special
    from .images import load_views
    from .texts import reading

    views, seed = options.views, options.training.seed - held_out
    paths = options.run.eval_data if held_out else options.run.data
    if tokenizer is None:
        return load_views(options, paths[0], seed, processor, counts)
    told = reading(options, counts, held_out)
    texts = load_texts(paths, usable=only_special(tokenizer), **told)
    assert limit is not None  # of texts it is known
    probabilities = (views.mask_prob, views.delete_prob, views.swap_prob)
    return TextViews(texts, tokenizer, limit, seed, *probabilities, counts=counts)


def _encoder(options: Options, data: Any) -> tuple[Any, int]:
    """Returns the encoder and its width."""
    import torch

    from ..data.images import SmallCNN
    from ..pretraining.encoder_folder import load_image_encoder
    from ..scoring.model_access import base_model
    from .images import width_of
    from .job import pretrained
    from .models import trained_part, without_pooler

    folder, dtype = options.model.model, getattr(torch, options.precision.dtype)
    if options.run.is_text():
        model = without_pooler(pretrained(options, "AutoModel"))
        return trained_part(options, model), base_model(model).config.hidden_size
    if folder is None:
        model = SmallCNN(data([0], 0)["input_ids_1"].shape[1]).to(dtype)
    else:
        model = without_pooler(load_image_encoder(folder, dtype))
    width = width_of(model, data)
    return trained_part(options, model), width
