"""Steps of the pretraining trainers against what one would write without the kernels, in turn.

    python benchmarks/pretraining_step.py [--seconds S] [--rows N]

A contrastive step (2 x 2048 views of 16 tokens, a small encoder, SimCLR) against the same trainer
with an eager NT-Xent, and a masked-language-modelling step (MiniLM's size, 32 x 128 tokens, 30,522
words) against BertForMaskedLM with the collator of transformers: masking, forward, backward,
clipping, AdamW. Losses are compared before time is taken. Runs with PyTorch as installed and on
huge pages, each step in a process of its own, and writes
benchmarks/results/pretraining-step-cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_kernels.commands import measure
from apt_model.pretraining import create_contrastive_pretrainer, create_mlm_pretrainer
from apt_model.pretraining.contrastive_pretrain import ContrastivePretrainer
from run import ROOT, SETTINGS, facts

FIELDS = (
    "pages", "step", "side", "ms", "ms_p20", "ms_p80", "peak_mib", "ours_speedup",
    "machine", "threads", "torch", "commit", "date",
)  # fmt: skip
VOCABULARY = 30522
TEMPERATURE = 0.07


class SmallEncoder(nn.Module):
    """Embeddings and one hidden layer a token, averaged: most of the step is the loss."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8192, width)
        self.layer = nn.Linear(width, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(input_ids)))


class EagerLosses(ContrastivePretrainer):
    """The same trainer with NT-Xent in plain PyTorch, as lightly and others write it."""

    def compute_infonce_loss(self, z_i, z_j, queue=None):
        z = F.normalize(torch.cat([z_i, z_j]), dim=1)
        logits = z @ z.T / self.config.temperature
        logits = logits.masked_fill(
            torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf
        )
        labels = torch.arange(len(z), device=z.device).roll(len(z_i))
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), accuracy


def contrastive_steps(rows: int):
    """{side: step}: both on copies of one encoder and the same views."""
    torch.manual_seed(0)
    encoder = SmallEncoder()
    views = torch.randint(0, 8192, (2, rows, 16))
    views[1, :, :8] = views[0, :, :8]
    options = {"hidden_dim": 256, "temperature": TEMPERATURE, "learning_rate": 0.0}
    ours = create_contrastive_pretrainer(copy.deepcopy(encoder), 128, **options)
    theirs = EagerLosses(copy.deepcopy(encoder), 128, config=options)
    theirs.projection.load_state_dict(ours.projection.state_dict())
    return {
        "apt_model": lambda: ours.train_step(*views)["loss"],
        "eager losses": lambda: theirs.train_step(*views)["loss"],
    }


def mlm_steps(rows: int):
    """{side: step}: MiniLM's size with a tied head; the masks are drawn in every step."""
    from transformers import BertConfig, BertForMaskedLM, BertModel, DataCollatorForLanguageModeling

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    ours_model = BertModel(config, add_pooling_layer=False)
    ours_model.load_state_dict(model.bert.state_dict())
    ours = create_mlm_pretrainer(
        ours_model, 384, vocab_size=VOCABULARY, mask_token_id=103, cls_token_id=101,
        sep_token_id=102, warmup_steps=0, learning_rate=0.0,
        lm_head=ours_model.get_input_embeddings(),
    )  # fmt: skip
    ids = torch.randint(1000, VOCABULARY, (rows, 128))
    ids[:, 0], ids[:, -1] = 101, 102
    # Mask, collate and train as transformers' documentation does it
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01, fused=True)
    collator = DataCollatorForLanguageModeling(_tokenizer(), mlm_probability=0.15)
    examples = [{"input_ids": row.tolist()} for row in ids]

    def theirs() -> float:
        batch = collator(examples)
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    def ours_step() -> float:
        return ours.train_step(torch.tensor([example["input_ids"] for example in examples]))[
            "mlm_loss"
        ]

    _same_mlm_loss(ours, model, ids)
    return {"apt_model": ours_step, "BertForMaskedLM": theirs}


def _same_mlm_loss(ours, model, ids: Tensor) -> None:
    """Asserts that both heads have one loss on the same masks, with the same weights."""
    transform = model.cls.predictions.transform
    ours.mlm_head.dense.load_state_dict(transform.dense.state_dict())
    ours.mlm_head.layer_norm.load_state_dict(transform.LayerNorm.state_dict())
    with torch.no_grad():
        masked_ids, labels, _ = ours.create_mlm_mask(ids[:4])
        expected = model(masked_ids, labels=labels).loss
        loss, _ = ours.compute_mlm_loss(ours.model(masked_ids).last_hidden_state, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def _tokenizer():
    """A tokenizer whose specials are BERT's: all that the collator asks of one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    for word, number in {
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        "[MASK]": 103,
    }.items():
        del words[f"w{number}"]
        words[word] = number
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), unk_token="[UNK]",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


STEPS = {"contrastive": (contrastive_steps, 2048), "mlm": (mlm_steps, 32)}


def compare(name: str, rows: int | None, seconds: float) -> list[dict]:
    make, usual = STEPS[name]
    runs = make(usual if rows is None else rows)
    if name == "contrastive":
        losses = [run() for run in runs.values()]
        assert abs(losses[0] - losses[1]) < 1e-3, f"the losses differ: {losses}"
    times = measure.alternate(runs, seconds)
    result = []
    for side, run in runs.items():
        low, middle, high = measure.quantiles(times[side])
        result.append(
            {
                "pages": os.environ["APT_BENCH_PAGES"],
                "step": name,
                "side": side,
                "ms": f"{middle:.4g}",
                "ms_p20": f"{low:.4g}",
                "ms_p80": f"{high:.4g}",
                "peak_mib": f"{max(measure.peak_memory(run) for _ in range(3)) / 2**20:.0f}",
                "ours_speedup": f"{measure.ratio(times[side], times['apt_model']):.3g}",
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for one comparison")
    parser.add_argument("--rows", type=int, help="samples a step, to try it out; nothing is kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, name = options.child
        with open(path, "w", newline="") as file:
            csv.DictWriter(file, FIELDS).writerows(compare(name, options.rows, options.seconds))
        return
    rows = []
    for pages, settings in SETTINGS.items():
        for name in STEPS:
            with tempfile.NamedTemporaryFile("r", suffix=".csv", newline="") as file:
                command = [sys.executable, __file__, "--child", file.name, name]
                command += ["--seconds", str(options.seconds)]
                command += [] if options.rows is None else ["--rows", str(options.rows)]
                environment = {**os.environ, **settings, "APT_BENCH_PAGES": pages}
                subprocess.run(command, env=environment, check=True)
                rows += [{**row, **facts()} for row in csv.DictReader(file, FIELDS)]
                for row in rows[-2:]:
                    print({k: v for k, v in row.items() if k in FIELDS[:8]}, flush=True)
    if options.rows is not None:
        return
    target = ROOT / "benchmarks" / "results" / "pretraining-step-cpu.csv"
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    main()
