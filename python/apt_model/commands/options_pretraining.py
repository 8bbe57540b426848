"""The commands `apt-model pretrain-mlm` and `apt-model pretrain-contrastive`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import INTERRUPTED


def add_commands(commands: Any) -> None:
    """Adds both commands to the subparsers of `apt-model`."""
    text = "train an encoder to predict masked tokens (BERT)"
    _add_mlm(_command(commands, "pretrain-mlm", _pretrain_mlm, text))
    text = "train an encoder of texts or images to tell samples by two views (SimCLR, MoCo)"
    _add_contrastive(_command(commands, "pretrain-contrastive", _pretrain_contrastive, text))


def _command(commands: Any, name: str, run: Any, text: str) -> Any:
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Stopped by Ctrl-C and started again with the "
        "same options, it continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_mlm(command: Any) -> None:
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="Hugging Face model folder")
    add("--data", type=Path, required=True, metavar="FILE",
        help="a text a line, or JSON lines with the string text")  # fmt: skip
    _add_files(command, "out/mlm", "held-out texts, measured before and after")
    add = command.add_argument_group("masks").add_argument
    add("--mask-prob", type=float, default=0.15, help="share of the tokens that are predicted")
    add("--whole-word", action="store_true", help="mask whole words")
    add("--nsp", action="store_true",
        help="also predict whether one segment of a text follows another")  # fmt: skip
    add("--segment-sentences", type=int, default=3, metavar="N", help="sentences of a segment")
    _add_training(command, learning_rate=5e-5, weight_decay=0.01, warmup=0, batch=32)
    _add_machine(command)


def _add_contrastive(command: Any) -> None:
    add = command.add_argument
    add("--model", type=Path, default=None, metavar="FOLDER",
        help="Hugging Face model folder; for images without it a small CNN")  # fmt: skip
    add("--data", type=Path, required=True, metavar="PATH",
        help="texts: .txt with one a line, .jsonl with the string text and, where there is one, "
        "positive; images: a folder, or an array .npy or .npz")  # fmt: skip
    _add_files(command, "out/contrastive", "held-out data, measured before and after")
    add = command.add_argument_group("loss").add_argument
    add("--method", choices=("simclr", "moco"), default="simclr", help="where negatives come from")
    add("--temperature", type=float, default=0.07, help="recommended 0.05-0.5")
    add("--projection-dim", type=int, default=128, help="width of what is compared")
    add("--hidden-dim", type=int, default=2048, help="of the projection head")
    add("--momentum", type=float, default=0.999, help="MoCo: of the second encoder")
    add("--queue-size", type=int, default=65536, help="MoCo: keys in the queue")
    add("--pooling", choices=("mean", "first"), default="mean", help="of the tokens")
    add = command.add_argument_group("views").add_argument
    add("--mask-prob", type=float, default=0.0, help="texts: tokens that are masked")
    add("--delete-prob", type=float, default=0.1, help="texts: tokens that are left out")
    add("--swap-prob", type=float, default=0.0, help="texts: neighbours that change places")
    add("--flip", action="store_true", help="images: turn half of the views left to right")
    add("--image-size", type=int, default=32, help="pixels of a side, for folders")
    add("--channels", type=int, choices=(1, 3), default=3, help="of the images in a folder")
    _add_training(command, learning_rate=1e-4, weight_decay=1e-6, warmup=0, batch=256)
    command.add_argument("--cache-chunk", type=int, default=None, metavar="ROWS",
        help="rows through the encoder at a time: less memory, the same update")  # fmt: skip
    _add_machine(command)


def _add_files(command: Any, output: str, held_out: str) -> None:
    add = command.add_argument
    add("--output", type=Path, default=Path(output), metavar="FOLDER",
        help="checkpoint.pt, curves.png, summary.json and the trained model go here")  # fmt: skip
    add("--eval-data", type=Path, metavar="PATH", help=held_out)
    add("--bad-rows", choices=("skip", "fail"), default="skip",
        help="of what cannot be used: skip names the first 20 and counts the others, fail names "
        "the first and ends")  # fmt: skip
    add("--restart", action="store_true", help="ignore an earlier checkpoint in the output folder")


def _add_training(
    command: Any, learning_rate: float, weight_decay: float, warmup: int, batch: int
) -> None:
    add = command.add_argument_group("training").add_argument
    add("--learning-rate", type=float, default=learning_rate, help="of AdamW")
    add("--weight-decay", type=float, default=weight_decay, help="of AdamW")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--batch-size", type=int, default=batch, help="samples a step")
    add("--gradient-accumulation-steps", type=int, default=1,
        help="parts a step is computed in: less memory, the same update")  # fmt: skip
    add("--warmup-steps", type=int, default=warmup, help="the learning rate rises from 0")
    add("--max-length", type=int, default=128, help="tokens of a text; cut beyond")
    add("--seed", type=int, default=0, help="of the order of the data and of what is random in it")


def _add_machine(command: Any) -> None:
    add = command.add_argument_group("machine").add_argument
    add("--device", default=None, help="cpu, cuda, …; without it a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the parameters")  # fmt: skip
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="of the computation")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS",
        help="0: only at the end, when stopped or at an error")  # fmt: skip


def _pretrain_mlm(options: argparse.Namespace) -> int:
    from .pretrain import pretrain_mlm  # takes seconds, --help need not wait

    return _report(pretrain_mlm(options))


def _pretrain_contrastive(options: argparse.Namespace) -> int:
    from .pretrain import pretrain_contrastive

    return _report(pretrain_contrastive(options))


def _report(summary: dict[str, Any]) -> int:
    print(json.dumps({k: v for k, v in summary.items() if k != "curves"}, indent=2))
    return 0 if summary["finished"] else INTERRUPTED
