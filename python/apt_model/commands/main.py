"""The command `apt-model`: training of language models, reward models and encoders."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .arguments import check, read_options
from .messages import is_main, say

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
USING = {
    "generate": "write responses to prompts with a trained model",
    "evaluate": "measure a trained model on other rows",
    "merge": "merge an adapter into its base model",
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
        if command in TRAINING:
            return _train(command, module, options, arguments[1:])
        check(options)
        return module.run(options)
    except KeyboardInterrupt:
        say("interrupted; a run that has a checkpoint continues with the same command")
        return INTERRUPTED
    except (OSError, FloatingPointError, ValueError) as error:
        return _failed(error)
    except RuntimeError as error:
        if not _is_of_several():
            raise
        return _failed(error)


def _is_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _failed(error: Exception) -> int:
    """Says what is wrong; of several processes this one ends at once, and the others with it."""
    process = f" in process {os.environ['RANK']}" if not is_main() else ""
    if is_main() or not getattr(error, "of_main", False):
        print(f"apt-model: error{process}: {error}", file=sys.stderr, flush=True)
    if _is_of_several():  # leaving the group properly would wait for the others
        _end(1)
    return 1


def _end(status: int) -> None:
    """Ends this process without the teardown of the interpreter.

    In it a thread of gloo that lets go of its last tensor can abort the process ("terminate called
    without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(command: str, module: Any, options: Any, arguments: Sequence[str]) -> int:
    if options.run.output is None:
        name = command.partition("-")[2].replace("-", "_")
        options.run.output = Path("out") / name
    check(options)
    from ..rl.reward_source import RewardError
    from ..training import processes
    from .job import run_command

    try:
        summary = run_command(command, module.make_job, options)
    except RewardError as error:
        raise ValueError(str(error)) from error
    status = 0 if summary is None else _report(command, summary, arguments)
    if _is_of_several():
        processes.end()
        _end(status)
    return status


def _report(command: str, summary: dict[str, Any], arguments: Sequence[str]) -> int:
    """Says what a run did; returns the exit status."""
    if not summary["finished"]:
        again = [argument for argument in arguments if argument != "--restart"]
        say(
            f"stopped after step {summary['total_steps']}; to continue: "
            f"{shlex.join([*_started_by(), 'apt-model', command, *again])}"
        )
    if is_main():
        print(json.dumps({k: v for k, v in summary.items() if k != "curves"}, indent=2))
    return 0 if summary["finished"] else INTERRUPTED


def _started_by() -> list[str]:
    """Returns the command line in front of this one: torchrun's, where there are processes."""
    if not _is_of_several():
        return []
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", f"--nproc-per-node={count}", "--no-python"]


def _parser() -> argparse.ArgumentParser:
    commands = {**TRAINING, **USING}
    names = "\n".join(f"  {name:22}{text}" for name, text in commands.items())
    parser = argparse.ArgumentParser(
        prog="apt-model",
        description=f"{__doc__}\n\ncommands:\n{names}",
        epilog="`apt-model COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="see above")
    return parser


if __name__ == "__main__":
    sys.exit(main())
