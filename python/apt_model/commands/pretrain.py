"""What `apt-model pretrain-mlm` and `pretrain-contrastive` do: data in, a trained folder out."""

from __future__ import annotations

import itertools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import ImageViews, SmallCNN, load_images
from ..data.texts import MaskedTexts, SentencePairs, Text, TextViews, load_texts, segments
from ..pretraining.contrastive_pretrain import ContrastivePretrainer, create_contrastive_pretrainer
from ..pretraining.created_modules import warmup
from ..pretraining.mlm_pretrain import MLMPretrainer, create_mlm_pretrainer
from ..training.files import EpochBatches, settings_of, write_whole
from .run import Checkpoint, run_steps

NOT_SETTINGS = ("run", "output", "restart", "device", "checkpoint_every", "bad_rows")
TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
MLM = ("mask_prob", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed")
CONTRASTIVE = ("temperature", "projection_dim", "hidden_dim", "learning_rate", "weight_decay",
               "max_grad_norm", "momentum", "queue_size", "pooling")  # fmt: skip


def pretrain_mlm(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    _begin(options)
    if options.nsp and options.whole_word:
        raise ValueError("--whole-word masks single texts: it cannot be used with --nsp")
    tokenizer = _tokenizer(options, masks=True)

    def load(path: Path, seed: int) -> MaskedTexts | SentencePairs:
        read = partial(load_texts, path, fail_on_bad_row=options.bad_rows == "fail")
        if not options.nsp:
            rows = read(usable=partial(_only_special, tokenizer))
            return MaskedTexts(rows, tokenizer, options.max_length, options.whole_word)

        def split(text: Text) -> list[str]:
            return segments(text.text, options.segment_sentences)

        rows = read(usable=lambda text: None if len(split(text)) > 1 else "has no two segments")
        return SentencePairs([split(row) for row in rows], tokenizer, options.max_length, seed)

    data = load(options.data, options.seed)
    held_out = load(options.eval_data, options.seed - 1) if options.eval_data else None
    model = _text_model(options)
    rows = model.get_input_embeddings().num_embeddings
    trainer = create_mlm_pretrainer(
        model,
        model.config.hidden_size,
        {name: getattr(options, name) for name in MLM},
        vocab_size=rows,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        special_token_ids=[*tokenizer.all_special_ids, *_without_token(tokenizer, rows)],
        use_nsp=options.nsp,
        lm_head=model.get_input_embeddings(),
        **_shared(options),
    )
    batches = EpochBatches(len(data), options.batch_size, options.seed, data)
    if options.nsp:
        data.per_epoch = batches.per_epoch

    def save(folder: Path) -> None:
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        heads = {"mlm_head": trainer.mlm_head, "nsp_head": trainer.nsp_head}
        state = {name: head.state_dict() for name, head in heads.items() if head is not None}
        torch.save(state, folder / "heads.pt")

    shown = {"loss": "total_loss", "accuracy": "mlm_accuracy"}
    return _run(options, trainer, batches, held_out, shown, save)


def pretrain_contrastive(options: Namespace) -> dict[str, Any]:
    """Trains as the options of the command say; returns what is written to `summary.json`."""
    of_text = options.data.suffix in TEXT_SUFFIXES
    _begin(options, needs_model=of_text)
    if of_text:
        tokenizer = _tokenizer(options, masks=options.mask_prob > 0)
        probabilities = (options.mask_prob, options.delete_prob, options.swap_prob)
        fail = options.bad_rows == "fail"

        def load(path: Path, seed: int) -> TextViews:
            texts = load_texts(path, fail_on_bad_row=fail, usable=partial(_only_special, tokenizer))
            return TextViews(texts, tokenizer, options.max_length, seed, *probabilities)

        model = _text_model(options)
        width = model.config.hidden_size
    else:

        def load(path: Path, seed: int) -> ImageViews:
            size, channels = options.image_size, options.channels
            fail = options.bad_rows == "fail"
            images = load_images(path, size, channels, fail_on_bad_image=fail)
            return ImageViews(images, seed, flip=options.flip)

    data = load(options.data, options.seed)
    held_out = load(options.eval_data, options.seed - 1) if options.eval_data else None
    if held_out is not None and len(held_out) < 2:
        raise ValueError(f"{options.eval_data} must hold two samples or more: one has no negatives")
    if not of_text:
        model = _image_model(options, data)
        width = model.width if isinstance(model, SmallCNN) else model.config.hidden_size
    trainer = create_contrastive_pretrainer(
        model,
        width,
        {name: getattr(options, name) for name in CONTRASTIVE},
        use_momentum_encoder=options.method == "moco",
        cache_chunk=options.cache_chunk,
        scheduler=partial(warmup, steps=options.warmup_steps) if options.warmup_steps else None,
        **_shared(options),
    )
    batches = EpochBatches(len(data), options.batch_size, options.seed, data, whole=True)

    def save(folder: Path) -> None:
        if hasattr(trainer.encoder, "save_pretrained"):
            trainer.encoder.save_pretrained(folder)
        else:
            folder.mkdir()
            torch.save(trainer.encoder.state_dict(), folder / "encoder.pt")
        if of_text:
            tokenizer.save_pretrained(folder)
        torch.save(trainer.projection.state_dict(), folder / "projection.pt")

    return _run(options, trainer, batches, held_out, {"loss": "loss", "accuracy": "accuracy"}, save)


def evaluate(trainer: Any, data: Any, batch_size: int) -> dict[str, float]:
    """Returns the losses and accuracies of `eval_step` on all of the data; nothing without data.

    Means over samples; of masked tokens over all of those. The batches are of nearly one size, and
    of two samples or more: a contrastive loss of one alone is 0.
    """
    if data is None:
        return {}
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    samples = len(data)
    parts = min(math.ceil(samples / batch_size), max(samples // 2, 1))
    bounds = [part * samples // parts for part in range(parts + 1)]
    for start, stop in itertools.pairwise(bounds):
        rows = list(range(start, stop))
        metrics = trainer.eval_step(**data(rows, 0))
        for name, value in metrics.items():
            if name.endswith(("loss", "accuracy")):
                count = metrics["num_masked"] if name.startswith("mlm") else len(rows)
                totals[name] = totals.get(name, 0.0) + value * count
                counts[name] = counts.get(name, 0.0) + count
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


def _run(
    options: Namespace,
    trainer: MLMPretrainer | ContrastivePretrainer,
    batches: EpochBatches,
    held_out: Any,
    shown: Mapping[str, str],
    save: Callable[[Path], None],
) -> dict[str, Any]:
    settings = settings_of(options, NOT_SETTINGS, options.data)
    checkpoint = Checkpoint(options.output / "checkpoint.pt", settings)
    before = evaluate(trainer, held_out, options.batch_size)
    if not options.restart and checkpoint.load(trainer):
        print(f"continuing after step {trainer.total_steps}", file=sys.stderr)
    steps = options.epochs * batches.per_epoch
    finished = run_steps(trainer, batches, steps, checkpoint, options.checkpoint_every, shown)
    trainer.plot_curves(options.output / "curves.png")
    summary = {
        "finished": finished,
        "before": before,
        "after": evaluate(trainer, held_out, options.batch_size) if finished else {},
        "total_steps": trainer.total_steps,
        "last_step": trainer.get_statistics(),
        "settings": settings,
        "curves": trainer.curves.as_lists(),
    }
    if finished:
        write_whole(options.output / "model", save)
    text = json.dumps(summary, indent=2)
    write_whole(options.output / "summary.json", lambda path: path.write_text(text))
    return summary


def _begin(options: Namespace, needs_model: bool = True) -> None:
    for name in ("epochs", "batch_size", "max_length", "segment_sentences"):
        if getattr(options, name, 1) < 1:  # one of them belongs to one command alone
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("warmup_steps", "checkpoint_every"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    torch.manual_seed(options.seed)  # of what is made: heads, queue, a small encoder
    if needs_model and options.model is None:
        raise ValueError("--model is needed to train on texts")
    if options.model is not None and not options.model.is_dir():
        raise FileNotFoundError(f"{options.model} is not a folder")
    for data in (options.data, options.eval_data):
        if data is not None and not data.exists():
            raise FileNotFoundError(f"{data} does not exist")


def _tokenizer(options: Namespace, masks: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if masks and tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {options.model} has no mask token")
    return tokenizer


def _text_model(options: Namespace) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(options.model, dtype=getattr(torch, options.dtype))


def _image_model(options: Namespace, data: ImageViews) -> nn.Module:
    if options.model is not None:
        return _text_model(options)
    channels = data([0], 0)["input_ids_1"].shape[1]
    return SmallCNN(channels).to(getattr(torch, options.dtype))


def _without_token(tokenizer: Any, rows: int) -> list[int]:
    """Returns the rows of an embedding that belong to no token, such as those that pad it."""
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def _only_special(tokenizer: Any, text: Text) -> str | None:
    """Returns the reason why a text of which nothing can be learned cannot be used."""
    special = set(tokenizer.all_special_ids)
    for part in (text.text, text.positive):
        if part is not None and special.issuperset(
            tokenizer(part, add_special_tokens=False)["input_ids"]
        ):
            return "has no tokens but special ones"
    return None


def _shared(options: Namespace) -> dict[str, Any]:
    return {
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "autocast_dtype": None if options.autocast == "none" else options.autocast,
    }
