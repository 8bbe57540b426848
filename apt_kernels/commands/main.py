"""The command `apt-kernels` and its subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import bench, check, info

COMMANDS = {"info": info, "check": check, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit code: 0 for success, 1 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="apt-kernels",
        description="Fused PyTorch kernels: what is here, whether it is right, how fast it is.",
    )
    parser.add_argument("--version", action="version", version=f"apt-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0]
        module.add_options(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except ValueError as error:  # a wrong argument: the message names it
        parser.exit(2, f"apt-kernels {options.command}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\napt-kernels {options.command}: interrupted\n")
