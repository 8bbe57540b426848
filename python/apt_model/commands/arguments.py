"""Flags, YAML files and `--help`, all made from the dataclasses that hold a command's options.

The options of a command are a dataclass whose fields are groups, and a group is a dataclass that
stands beside what it configures. A field of a group is one option:

    max_length: int = field(default=512, metadata={"help": "tokens of prompt and answer"})

is `--max-length N` on the command line and `max_length: N` in a YAML file. Types are bool (`--x`
and `--no-x`), int, float, str, Path, Literal, tuple[T, ...] (several values), and each of them or
None (written `none`). Metadata besides `help`: `metavar`; `names`, other flags that mean the same;
`recommended`, the range beyond which the command warns; `replaced_again`, True where several values
that come again replace the values before; `decides`, False where the option does not change what is
trained, so that it may change when a run is continued. A group may have `check()`, which raises
ValueError that names the flag. The title of a group in `--help` is the first line of its docstring.

The modules that hold groups must not import PyTorch: `--help` is to come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from .messages import say

CONFIG = "config"
COMMAND = "command"  # the key of a YAML file that tells the command it is of
COMMAND_LINE, TOLD = "--command-line", "flags_of_several_values"


def option_name(field: str) -> str:
    """Returns the flag of a field."""
    return f"--{field.replace('_', '-')}"


def read_options(command: str, options_class: type, arguments: Sequence[str]) -> Any:
    """Returns the options that the command line and the YAML file of `--config` give.

    Args:
        command: the name, for messages.
        options_class: a dataclass of groups.
        arguments: the command line behind the command's name; it wins over the file.

    Raises:
        ValueError: the file is no YAML, or has a key that is no option.
        SystemExit: the command line is wrong (status 2), or asks for help (status 0).
    """
    parser = parser_of(command, options_class)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument(option_name(CONFIG), type=Path)
    file = before.parse_known_args(arguments)[0].config
    given = [] if file is None else _tokens(file, command, options_class)
    values = vars(parser.parse_args([*given, *([COMMAND_LINE] if given else []), *arguments]))
    groups = {}
    for name, group in groups_of(options_class).items():
        fields = {f.name: values[f.name] for f in dataclasses.fields(group)}
        groups[name] = group(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        )
    return options_class(**groups)


def parser_of(command: str, options_class: type) -> argparse.ArgumentParser:
    """Returns the parser of a command; its description is the docstring of `options_class`."""
    parser = argparse.ArgumentParser(
        prog=f"apt-model {command}",
        usage=_usage(command, options_class),
        description=" ".join((options_class.__doc__ or "").split()),
        allow_abbrev=False,
    )
    parser.add_argument(
        option_name(CONFIG),
        type=Path,
        metavar="FILE.yaml",
        help="file with options, by the names below; those on the command line win",
    )
    parser.add_argument(COMMAND_LINE, action=_CommandLine, nargs=0, help=argparse.SUPPRESS)
    for group in groups_of(options_class).values():
        section = parser.add_argument_group(title_of(group))
        for field, kind in fields_of(group):
            _add_field(section, field, kind)
    return parser


class _Several(argparse.Action):
    """Values of a flag; where it comes again, more of them. The command line replaces a file's."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        told: frozenset[str] = getattr(namespace, TOLD, frozenset())
        before = (getattr(namespace, self.dest) or []) if self.dest in told else []
        # `none` alone is the value of an option that may be left out
        setattr(namespace, self.dest, None if values == [None] else [*before, *values])
        setattr(namespace, TOLD, told | {self.dest})


class _CommandLine(argparse.Action):
    """Separates what a file says from the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, TOLD, frozenset())


def _usage(command: str, options_class: type) -> str:
    fields = [f for group in groups_of(options_class).values() for f in dataclasses.fields(group)]
    needed = (
        f"{option_name(f.name)} {f.metadata.get('metavar', 'VALUE')}"
        for f in fields
        if _is_required(f)
    )
    return " ".join(["apt-model", command, *needed, "[OPTIONS]"]).replace("%", "%%")


def title_of(group: type) -> str:
    """Returns the title of a group in the help."""
    return (group.__doc__ or group.__name__).split("\n")[0].rstrip(".").lower()


def groups_of(options_class: type) -> dict[str, type]:
    """Returns the classes of the groups of a command, by their fields."""
    hints = typing.get_type_hints(options_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(options_class)}


def fields_of(group: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Returns the fields of a group with their types."""
    hints = typing.get_type_hints(group)
    return [(field, hints[field.name]) for field in dataclasses.fields(group)]


def options_of(options: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yields the field and the value of every option."""
    for group in dataclasses.fields(options):
        held = getattr(options, group.name)
        for field in dataclasses.fields(held):
            yield field, getattr(held, field.name)


def check(options: Any) -> None:
    """Lets every group check its values, and says on stderr what lies outside of what is advised.

    Raises:
        ValueError: names the option, what was expected and what came.
    """
    for group in dataclasses.fields(options):
        held = getattr(options, group.name)
        if hasattr(held, "check"):
            held.check()
    for field, value in options_of(options):
        low, high = field.metadata.get("recommended", (None, None))
        if low is not None and value is not None and not low <= value <= high:
            say(
                f"{option_name(field.name)} {value:g} is outside of {low:g} to {high:g}, which is "
                "recommended"
            )


def check_at_least(group: Any, least: float, *names: str) -> None:
    """Raises ValueError that names the first option below `least`."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= least:
            wanted = "not be negative" if least == 0 else f"be at least {least:g}"
            raise ValueError(f"{option_name(name)} must {wanted}, got {value}")


def as_mapping(options: Any) -> dict[str, Any]:
    """Returns all options by name, in the types of YAML and JSON."""
    return {field.name: _plain(value) for field, value in options_of(options)}


def deciding(options: Any) -> dict[str, Any]:
    """Returns those options that decide what is trained; files are told by their contents."""
    return {
        field.name: _plain(value)
        for field, value in options_of(options)
        if field.metadata.get("decides", True) and not _is_path(value)
    }


def _is_path(value: Any) -> bool:
    several = value if isinstance(value, tuple) else (value,)
    return any(isinstance(item, Path) for item in several)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _add_field(section: Any, field: dataclasses.Field[Any], kind: Any) -> None:
    kind, optional = _without_none(kind)
    flags = [*dict.fromkeys([*field.metadata.get("names", ()), option_name(field.name)])]
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    more: dict[str, Any] = {
        "dest": field.name,
        "help": _help(field).replace("%", "%%"),
        "required": required,
    }
    if not required:
        more["default"] = _default(field)
    if kind is bool:
        section.add_argument(*flags, action=argparse.BooleanOptionalAction, **more)
        return
    if typing.get_origin(kind) is tuple:
        kind, more["nargs"] = typing.get_args(kind)[0], "+"
        more.setdefault("metavar", field.name.upper())
        if not field.metadata.get("replaced_again"):
            more["action"] = _Several
    if typing.get_origin(kind) is Literal:
        more["choices"] = typing.get_args(kind)
        kind = type(more["choices"][0])
    if "metavar" in field.metadata:
        more["metavar"] = field.metadata["metavar"]
    section.add_argument(*flags, type=_or_none(kind) if optional else kind, **more)


def _without_none(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(kinds) != 1:
            raise TypeError(f"an option has one type, or that one and None, got {kind}")
        return kinds[0], True
    return kind, False


def _or_none(kind: Any) -> Any:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse puts it into its message
    return read


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata.get("help", "")
    if "recommended" in field.metadata:
        low, high = (f"{bound:g}".replace("e-0", "e-") for bound in field.metadata["recommended"])
        text += f"; recommended {low}-{high}"
    if _is_required(field):
        return f"{text} (required)"
    default = _plain(_default(field))
    if default is None or default is False or default == []:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def _tokens(file: Path, command: str, options_class: type) -> list[str]:
    """Returns what a YAML file says as a command line, so that both are read alike."""
    known = {}
    for group in groups_of(options_class).values():
        for field in dataclasses.fields(group):
            for name in (option_name(field.name), *field.metadata.get("names", ())):
                known[name.lstrip("-").replace("-", "_")] = field.name
    tokens = []
    for key, value in _read_yaml(file).items():
        if key == COMMAND:
            if value != command:
                raise ValueError(f"{file} is of the command {value}, not of {command}")
            continue
        name = known.get(str(key).replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{file}: {key!r} is no option of {command}{hint}; the options are: "
                f"{', '.join(sorted(set(known.values())))}"
            )
        tokens += _as_tokens(file, name, value)
    return tokens


def command_of(file: Path) -> str:
    """Returns the name of the command that a YAML file is of.

    Raises:
        ValueError: it does not say so.
    """
    command = _read_yaml(file).get(COMMAND)
    if not isinstance(command, str):
        raise ValueError(f"{file}: expected the key {COMMAND}, as run.yaml of a run has it")
    return command


def _as_tokens(file: Path, name: str, value: Any) -> list[str]:
    flag = option_name(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    if isinstance(value, Mapping):
        raise ValueError(f"{file}: {name}: expected a value, got a mapping")
    return [f"{flag}={'none' if value is None else value}"]


def _read_yaml(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        with open(file, encoding="utf-8") as opened:
            read = yaml.safe_load(opened)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ValueError(f"{file}: expected a mapping of options, got {type(read).__name__}")
    return read
