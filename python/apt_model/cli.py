"""The command `apt-model`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli_pretraining import add_commands as add_pretraining

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FileNotFoundError, FloatingPointError, ValueError) as error:
        print(f"apt-model: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apt-model", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train_dpo(commands)
    add_pretraining(commands)
    return parser


def _add_train_dpo(commands: Any) -> None:
    command = commands.add_parser(
        "train-dpo",
        help="train a causal language model on preference pairs (DPO)",
        description="Train a causal language model on preference pairs by direct preference "
        "optimization. Stopped by Ctrl-C and started again with the same options, it continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=_train_dpo)
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="Hugging Face model folder")
    add("--data", type=Path, required=True, metavar="FILE",
        help="JSON lines with the strings prompt, chosen and rejected")  # fmt: skip
    add("--output", type=Path, default=Path("out/dpo"), metavar="FOLDER",
        help="checkpoint.pt, curves.png, summary.json and the trained model go here")  # fmt: skip
    add("--eval-data", type=Path, metavar="FILE",
        help="held-out pairs, measured before and after")  # fmt: skip
    add("--reference-model", type=Path, metavar="FOLDER",
        help="reference; without it a frozen copy of the model")  # fmt: skip
    add("--gguf-file", metavar="NAME", help="of the model, inside its folder")
    add("--bad-rows", choices=("skip", "fail"), default="skip",
        help="what to do with a row that cannot be used; either way its line is named")  # fmt: skip
    add("--restart", action="store_true", help="ignore an earlier checkpoint in the output folder")
    _add_training(command.add_argument_group("training"))
    _add_text(command.add_argument_group("text"))
    _add_machine(command.add_argument_group("machine"))


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--beta", type=float, default=0.1, help="pull to the reference; recommended 0.05-0.5")
    add("--label-smoothing", type=float, default=0.0,
        help="probability that a preference is wrong; recommended 0-0.1")  # fmt: skip
    add("--learning-rate", type=float, default=1e-6, help="recommended 1e-6-1e-5")
    add("--loss-type", default="sigmoid", help="as apt_kernels.dpo_loss")
    add("--reference-free", action="store_true", help="compare with no reference")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm")
    add("--epochs", type=int, default=1, help="passes over the data; recommended 1-3")
    add("--batch-size", type=int, default=8, help="pairs a step; recommended 8-64")
    add("--gradient-accumulation-steps", type=int, default=1,
        help="parts a step is computed in: less memory, the same update")  # fmt: skip
    add("--warmup-steps", type=int, default=0,
        help="the learning rate rises from 0; recommended 5-10%% of the steps")  # fmt: skip
    add("--train-last-layers", type=int, default=None, metavar="N",
        help="freeze all but the last N layers; without it everything is trained")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order of the pairs")


def _add_text(group: Any) -> None:
    add = group.add_argument
    add("--max-length", type=int, default=512, help="tokens of prompt and answer; cut beyond")
    add("--max-prompt-length", type=int, default=None, help="without it half of --max-length")
    add("--chat-template", action="store_true", help="put the prompt into the chat template")


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--device", default=None, help="cpu, cuda, …; without it a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the parameters")  # fmt: skip
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="of the computation")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS",
        help="0: only at the end or when stopped")  # fmt: skip


def _train_dpo(options: argparse.Namespace) -> int:
    from .dpo_run import train_dpo  # what it imports takes seconds, --help need not wait

    summary = train_dpo(options)
    print(json.dumps({k: v for k, v in summary.items() if k != "curves"}, indent=2))
    return 0 if summary["finished"] else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
