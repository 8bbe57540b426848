"""The command `apt-model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .options import add_commands
from .options_pretraining import add_commands as add_pretraining

NEEDED = ("transformers", "tqdm", "matplotlib")  # the extra `train`; the library needs none


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:  # said now, not after the training
        print(
            f"apt-model: error: missing packages: {', '.join(missing)} "
            "(pip install 'apt-kernels[train]')",
            file=sys.stderr,
        )
        return 1
    try:
        return options.run(options)
    except (OSError, FloatingPointError, ValueError) as error:
        print(f"apt-model: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apt-model", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_commands(commands)
    add_pretraining(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
