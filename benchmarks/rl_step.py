"""One DPO step of the demo against TRL's DPOTrainer doing the same step, in turn, in one process.

    python benchmarks/dpo_step.py [--rounds N] [--all-layers]

SmolLM2-135M, 8 real pairs, the last layers trained (or all), float32, AdamW, one step: policy and
reference forward, backward, clipping, update. The losses are compared before time is taken. Runs
with PyTorch as installed and on huge pages, and writes benchmarks/results/dpo-step-cpu.csv.
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

import measure
from apt_model import demo_dpo
from apt_model.model_access import train_last_layers
from apt_model.preference_data import collate
from apt_model.rl import create_dpo_trainer
from run import ROOT, SETTINGS, facts

FIELDS = (
    "pages", "trained", "side", "ms", "ms_p20", "ms_p80", "peak_mib", "ours_speedup",
    "machine", "threads", "torch", "commit", "date",
)  # fmt: skip


def trl_step(model, reference, tokenizer, pairs, learning_rate: float):
    """(step, loss): TRL's trainer on the same pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    for loaded in (model, reference):  # float32 read from GGUF, which transformers calls quantized
        loaded.is_quantized = False
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * len(pairs)
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=0.1, learning_rate=learning_rate, report_to=[],
        per_device_train_batch_size=len(pairs), bf16=False, gradient_checkpointing=False,
        use_cpu=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, reference, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    examples = [
        {
            "prompt_ids": list(pair.prompt),
            "chosen_ids": list(pair.chosen),
            "rejected_ids": list(pair.rejected),
        }
        for pair in pairs
    ]
    batch = trainer.data_collator(examples)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def compare(all_layers: bool, rounds: float) -> list[dict]:
    model, tokenizer = demo_dpo.load_model(torch.device("cpu"))
    pairs = demo_dpo.load_preferences(tokenizer)[0][:8]
    if not all_layers:
        train_last_layers(model, demo_dpo.SETTINGS["trained_layers"])
    # TRL patches the models that it gets; the frozen parameters are shared between all of them.
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    theirs = copy.deepcopy(model, dict(frozen))
    reference = copy.deepcopy(model, dict(frozen)).requires_grad_(False)
    ours = create_dpo_trainer(model, beta=0.1, learning_rate=0.0)
    their_step = trl_step(theirs, reference, tokenizer, pairs, learning_rate=0.0)
    batch = collate(pairs)

    def our_step() -> float:
        return ours.train_step(**batch)["loss"]

    for _ in range(2):
        a, b = our_step(), their_step()
        assert abs(a - b) < 1e-3, f"the losses differ: {a} and {b}"
    runs = {"apt_model": our_step, "TRL": their_step}
    times = measure.alternate(runs, rounds)
    rows = []
    for side, run in runs.items():
        low, middle, high = measure.quantiles(times[side])
        rows.append(
            {
                "pages": os.environ["APT_BENCH_PAGES"],
                "trained": "all layers" if all_layers else "last layers",
                "side": side,
                "ms": f"{middle:.4g}",
                "ms_p20": f"{low:.4g}",
                "ms_p80": f"{high:.4g}",
                "peak_mib": f"{max(measure.peak_memory(run) for _ in range(3)) / 2**20:.0f}",
                "ours_speedup": f"{measure.ratio(times[side], times['apt_model']):.3g}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for one comparison")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, layers = options.child
        with open(path, "w", newline="") as file:
            csv.DictWriter(file, FIELDS).writerows(compare(layers == "all", options.seconds))
        return
    rows = []
    for pages, settings in SETTINGS.items():
        for layers in ("last", "all"):
            with tempfile.NamedTemporaryFile("r", suffix=".csv", newline="") as file:
                command = [sys.executable, __file__, "--child", file.name, layers]
                command += ["--seconds", str(options.seconds)]
                environment = {**os.environ, **settings, "APT_BENCH_PAGES": pages}
                subprocess.run(command, env=environment, check=True)
                rows += [{**row, **facts()} for row in csv.DictReader(file, FIELDS)]
    target = ROOT / "benchmarks" / "results" / "dpo-step-cpu.csv"
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({k: v for k, v in row.items() if k in FIELDS[:8]})
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    main()
