"""The options of the commands that train, with what is recommended."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
CONTINUES = "Stopped by Ctrl-C and started again with the same options, it continues."
ADVANTAGES = ("relative", "normalized", "rank")
AGGREGATIONS = ("token_mean", "token_sum", "sequence_mean", "sequence_sum", "dr_grpo")
RECOMMENDED = {  # --help says so too; the commands warn of what lies outside
    "train-dpo": {
        "beta": (0.05, 0.5), "label_smoothing": (0, 0.1), "learning_rate": (1e-6, 1e-5),
    },
    "train-grpo": {"group_size": (4, 8), "learning_rate": (1e-6, 1e-5)},
    "train-rlhf": {
        "ppo_epochs": (4, 8), "clip_epsilon": (0.1, 0.3), "kl_coef": (0.01, 0.2),
        "learning_rate": (1e-6, 1e-5),
    },
}  # fmt: skip
PAIRS = "JSON lines with the strings prompt, chosen and rejected"
PROMPTS = "JSON lines with the string prompt; other fields are for the reward function"
LENGTHS = {  # what --max-length and --max-prompt-length are
    "pairs": ("tokens of prompt and answer; cut beyond", "without it half of --max-length"),
    "prompts": (
        "tokens of prompt and response; sampling ends there",
        "rows with longer prompts cannot be used; without it one less than --max-length",
    ),
}


def add_commands(commands: Any) -> None:
    """Adds the commands to the parser of `apt-model`."""
    command = _command(
        commands, "train-dpo", "train_dpo", "train a causal language model on preference pairs (DPO)",
        "Train a causal language model on preference pairs by direct preference optimization.",
    )  # fmt: skip
    _add_files(command, "dpo", PAIRS)
    command.add_argument("--reference-model", type=Path, metavar="FOLDER",
        help="reference; without it a frozen copy of the model")  # fmt: skip
    _add_dpo(_add_training(command, 1e-6, "1e-6-1e-5", "pairs"))
    command = _command(
        commands, "train-reward-model", "train_reward_model", "train a reward model on preference pairs",
        "Train a reward model, a base model and a head that scores texts, on preference pairs.",
    )  # fmt: skip
    _add_files(command, "reward_model", PAIRS)
    _add_reward(_add_training(command, 1e-5, "1e-6-1e-5; a head alone: 1e-4-1e-2", "pairs"))
    command = _command(
        commands, "train-grpo", "train_policy", "train a language model on its own responses (GRPO)",
        "Train a causal language model on groups of its own responses by group relative policy "
        "optimization.",
    )  # fmt: skip
    _add_files(command, "grpo", PROMPTS)
    _add_rewards(command)
    _add_grpo(_add_training(command, 1e-5, "1e-6-1e-5", "prompts"))
    command = _command(
        commands, "train-rlhf", "train_policy", "train a language model on its own responses (PPO)",
        "Train a causal language model on its own responses by proximal policy optimization "
        "against a reward, with a penalty on its divergence from where it began.",
    )  # fmt: skip
    _add_files(command, "rlhf", PROMPTS)
    _add_rewards(command)
    _add_rlhf(_add_training(command, 1e-5, "1e-6-1e-5", "prompts"))


def _command(commands: Any, name: str, module: str, help: str, description: str) -> Any:
    command = commands.add_parser(
        name,
        help=help,
        description=f"{description} {CONTINUES}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=partial(_run, module, name))
    return command


def _run(module: str, command: str, options: argparse.Namespace) -> int:
    for name, (low, high) in RECOMMENDED.get(command, {}).items():
        if not low <= (value := getattr(options, name)) <= high:
            option = f"--{name.replace('_', '-')} {value:g}"
            print(f"apt-model: {option} is outside of {low:g} to {high:g}, which is recommended",
                  file=sys.stderr)  # fmt: skip
    # What it imports takes seconds, --help need not wait
    train = getattr(importlib.import_module(f"{__package__}.{module}"), command.replace("-", "_"))
    try:
        summary = train(options)
    except importlib.import_module("apt_model.rl.reward_source").RewardError as error:
        raise ValueError(str(error)) from error
    print(json.dumps({k: v for k, v in summary.items() if k != "curves"}, indent=2))
    return 0 if summary["finished"] else INTERRUPTED


def _add_files(command: Any, name: str, rows: str) -> None:
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="Hugging Face model folder")
    add("--data", type=Path, required=True, metavar="FILE", help=rows)
    add("--output", type=Path, default=Path("out") / name, metavar="FOLDER",
        help="checkpoint.pt, curves.png, summary.json and the trained model go here")  # fmt: skip
    add("--eval", "--eval-data", dest="eval_data", type=Path, metavar="FILE",
        help="held-out rows, measured as training goes; the best state is kept")  # fmt: skip
    add("--eval-every", type=int, default=100, metavar="STEPS", help="0: only at the end")
    add("--patience", type=int, default=0, metavar="N",
        help="stop after N measurements without a better one; 0: never")  # fmt: skip
    add("--gguf-file", metavar="NAME", help="of the model, inside its folder")
    add("--bad-rows", choices=("skip", "fail"), default="skip",
        help="of rows that cannot be used: skip names the lines of the first 20 and counts the "
        "others, fail names that of the first and ends")  # fmt: skip
    add("--restart", action="store_true",
        help="begin anew: what an earlier run left in the output folder is removed after the first "
        "step, its model when this one's is saved")  # fmt: skip


def _add_training(command: Any, learning_rate: float, recommended: str, rows: str) -> Any:
    """Adds what every command has; returns the group for what this one has."""
    group = command.add_argument_group("training")
    add = group.add_argument
    add("--learning-rate", type=float, default=learning_rate, help=f"recommended {recommended}")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm")
    add("--epochs", type=int, default=1, help="passes over the data; recommended 1-3")
    add("--batch-size", type=int, default=8, help=f"{rows} a step; recommended 8-64")
    add("--gradient-accumulation-steps", type=int, default=1,
        help="parts a step is computed in: less memory, the same update")  # fmt: skip
    add("--warmup-steps", type=int, default=0,
        help="the learning rate rises from 0; recommended 5-10%% of the steps")  # fmt: skip
    add("--train-last-layers", type=int, default=None, metavar="N",
        help="freeze all but the last N layers; without it everything is trained")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order of the rows and of what is sampled")
    add = command.add_argument_group("text").add_argument
    add("--max-length", type=int, default=512, help=LENGTHS[rows][0])
    add("--max-prompt-length", type=int, default=None, help=LENGTHS[rows][1])
    add("--chat-template", action="store_true", help="put the prompt into the chat template")
    add = command.add_argument_group("machine").add_argument
    add("--device", default=None, help="cpu, cuda, …; without it a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the parameters")  # fmt: skip
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="of the computation")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS",
        help="0: only at the end, when stopped or at an error")  # fmt: skip
    add("--tensorboard", type=Path, metavar="FOLDER",
        help="also write the curves there, for TensorBoard")  # fmt: skip
    return group


def _add_dpo(group: Any) -> None:
    add = group.add_argument
    add("--beta", type=float, default=0.1, help="pull to the reference; recommended 0.05-0.5")
    add("--label-smoothing", type=float, default=0.0,
        help="probability that a preference is wrong; recommended 0-0.1")  # fmt: skip
    add("--loss-type", default="sigmoid", help="as apt_kernels.dpo_loss")
    add("--reference-free", action="store_true", help="compare with no reference")


def _add_reward(group: Any) -> None:
    add = group.add_argument
    add("--pooling", choices=("last", "mean", "max"), default="last",
        help="last suits models that read left to right, mean those that read all")  # fmt: skip
    add("--head-layers", type=int, default=1, help="linear layers of the head; recommended 1-2")
    add("--dropout", type=float, default=0.1, help="between them")
    add("--margin", type=float, default=0.0, help="by how much chosen answers are better")
    add("--center-coef", type=float, default=0.0,
        help="weight of the term that keeps rewards around 0; recommended 0-0.01")  # fmt: skip


def _add_rewards(command: Any) -> None:
    add = command.add_argument_group("reward").add_argument
    add("--reward", metavar="FILE.py:NAME",
        help="function of a row of the data (a dictionary) and a response (a string) that "
        "returns a number; also package.module:NAME")  # fmt: skip
    add("--reward-model", type=Path, metavar="FOLDER",
        help="instead: the model folder that train-reward-model has made")  # fmt: skip


def _add_sampling(group: Any, kl_coef_help: str) -> None:
    add = group.add_argument
    add("--kl-coef", type=float, default=0.1, help=kl_coef_help)
    add("--target-kl", type=float, default=None,
        help="adapt --kl-coef to this divergence, in nats a token")  # fmt: skip
    add("--max-new-tokens", type=int, default=128, help="of a response")
    add("--eval-temperature", type=float, default=0.0,
        help="of held-out responses; 0: always the likeliest token")  # fmt: skip


def _add_grpo(group: Any) -> None:
    add = group.add_argument
    add("--group-size", type=int, default=4, help="responses a prompt; recommended 4-8")
    add("--advantage-type", choices=ADVANTAGES, default="relative", help="relative first")
    add("--clip-range", type=float, default=0.2, help="how far the ratio may move from 1")
    add("--aggregation", choices=AGGREGATIONS, default="sequence_mean", help="of token losses")
    add("--ratio-level", choices=("token", "sequence"), default="token", help="sequence: GSPO")
    add("--use-critic", action="store_true", help="also train a value head")
    add("--sampling-temperature", type=float, default=1.0, help="of the responses")
    _add_sampling(group, "weight of the divergence from a frozen copy; 0: no copy is made")


def _add_rlhf(group: Any) -> None:
    add = group.add_argument
    add("--ppo-epochs", type=int, default=4, help="passes over what was sampled; recommended 4-8")
    add("--minibatch-size", type=int, default=4, help="responses an optimizer step")
    add("--clip-epsilon", type=float, default=0.2,
        help="how far the ratio may move from 1; recommended 0.1-0.3")  # fmt: skip
    add("--value-loss-coef", type=float, default=0.1, help="weight of the value loss")
    add("--entropy-coef", type=float, default=0.01, help="weight of the entropy bonus")
    add("--reward-scale", type=float, default=1.0, help="factor of the rewards")
    add("--gamma", type=float, default=0.99, help="discount of a token")
    add("--gae-lambda", type=float, default=0.95, help="decay of the trace")
    add("--temperature", type=float, default=1.0, help="of the responses")
    _add_sampling(group, "weight of the KL penalty of each token; recommended 0.01-0.2")
