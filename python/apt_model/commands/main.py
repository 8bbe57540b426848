"""The command `apt-model`: training of language models, reward models and encoders."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .arguments import check, read_options

NEEDED = ("transformers", "tqdm", "matplotlib", "yaml")  # of the extra `train`
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
TRAINING = {
    "train-dpo": "train a causal language model on preference pairs (DPO)",
    "train-reward-model": "train a reward model on preference pairs",
    "train-grpo": "train a language model on its own responses (GRPO)",
    "train-rlhf": "train a language model on its own responses (PPO)",
    "pretrain-mlm": "train an encoder to predict masked tokens (BERT)",
    "pretrain-contrastive": "train an encoder to tell samples by two views (SimCLR, MoCo)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = _parser().parse_args(arguments[:1]).command
    # Only the command's own options are imported: `--help` comes at once
    module = importlib.import_module(f"{__package__}.{command.replace('-', '_')}")
    try:
        options = read_options(command, module.Options, arguments[1:])
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:  # said now, not after the training
            raise ValueError(
                f"missing packages: {', '.join(missing)} (pip install 'apt-kernels[train]')"
            )
        return _train(command, module, options)
    except (OSError, FloatingPointError, ValueError) as error:
        print(f"apt-model: error: {error}", file=sys.stderr)
        return 1


def _train(command: str, module: Any, options: Any) -> int:
    if options.run.output is None:
        name = command.partition("-")[2].replace("-", "_")
        options.run.output = Path("out") / name
    check(options)
    from ..rl.reward_source import RewardError
    from .job import run_command

    try:
        summary = run_command(module.make_job, options)
    except RewardError as error:
        raise ValueError(str(error)) from error
    print(json.dumps({k: v for k, v in summary.items() if k != "curves"}, indent=2))
    return 0 if summary["finished"] else INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:22}{text}" for name, text in TRAINING.items())
    parser = argparse.ArgumentParser(
        prog="apt-model",
        description=f"{__doc__}\n\ncommands:\n{names}",
        epilog="`apt-model COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=TRAINING, metavar="COMMAND", help="see above")
    return parser


if __name__ == "__main__":
    sys.exit(main())
