"""Configurations of the trainers: how they are read and checked."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


def read_config(config: Any, config_class: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """Returns a checked `config_class` made from None, a mapping or such an object.

    Args:
        config: None (the defaults), a mapping of field names to values, or a `config_class`.
        config_class: a dataclass whose `validate()` raises on values that cannot be.
        overrides: fields that replace those of `config`.

    Raises:
        TypeError: `config` is something else.
        ValueError: an unknown key, or an impossible value.
    """
    if isinstance(config, Mapping):
        values = {**config, **(overrides or {})}
        reject_unknown(values, field_names(config_class), config_class.__name__)
        return config_class(**values)
    if config is None:
        return read_config({}, config_class, overrides)
    if not isinstance(config, config_class):
        raise TypeError(
            f"config must be None, a mapping or a {config_class.__name__}, "
            f"got {type(config).__name__}"
        )
    if overrides:
        reject_unknown(overrides, field_names(config_class), config_class.__name__)
        return dataclasses.replace(config, **overrides)
    config.validate()
    return config


def split_options(
    config: Any, config_class: type, options: Mapping[str, Any], trainer_class: type
) -> tuple[Any, dict[str, Any]]:
    """Returns the configuration and the rest of `options`, which must be the trainer's.

    Args:
        config: as `read_config`.
        config_class: `options` with the names of its fields replace the values of `config`.
        options: keyword arguments of its constructor.
        trainer_class: all keyword arguments of its constructor and its bases' are valid too.
    """
    fields = field_names(config_class)
    keywords: dict[str, None] = {}
    for owner in trainer_class.__mro__[:-1]:
        initialize: Any = owner.__init__  # type: ignore[misc]  # of each base, its own
        for name, parameter in inspect.signature(initialize).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY or name in ("optimizer", "device"):
                keywords[name] = None
    reject_unknown(options, list(dict.fromkeys([*fields, *keywords])), trainer_class.__name__)
    overrides = {name: options[name] for name in fields if name in options}
    rest = {name: value for name, value in options.items() if name not in fields}
    return read_config(config, config_class, overrides), rest


def field_names(config_class: type) -> list[str]:
    """Returns the names of the fields of a configuration, in order."""
    return [field.name for field in dataclasses.fields(config_class)]


def reject_unknown(values: Mapping[str, Any], valid: list[str], owner: str) -> None:
    """Raises ValueError that lists the `valid` keys when `values` has another one."""
    unknown = sorted(str(key) for key in values if key not in valid)
    if unknown:
        raise ValueError(
            f"{owner} has no option {', '.join(map(repr, unknown))}; "
            f"the valid options are: {', '.join(valid)}"
        )


def check_number(
    config: Any,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Raises ValueError unless the field `name` is a finite number within the bounds.

    Args:
        config: the configuration.
        name: its field.
        above: the value must be larger than this.
        at_least: the value must be this or larger.
        below: the value must be smaller than this.
        optional: None is allowed too.
    """
    value = getattr(config, name)
    if value is None and optional:
        return
    bounds = [
        *([f"> {above}"] if above is not None else []),
        *([f">= {at_least}"] if at_least is not None else []),
        *([f"< {below}"] if below is not None else []),
    ]
    possible = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not possible
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (below is not None and value >= below)
    ):
        wanted = " and ".join(["a finite number", *bounds])
        none = ", or None" if optional else ""
        raise ValueError(f"{type(config).__name__}.{name} must be {wanted}{none}, got {value!r}")


def check_flag(config: Any, name: str, *, optional: bool = False) -> None:
    """Raises ValueError unless the field `name` is True or False (or None, where optional)."""
    value = getattr(config, name)
    if not isinstance(value, bool) and not (optional and value is None):
        none = " or None" if optional else ""
        raise ValueError(
            f"{type(config).__name__}.{name} must be True or False{none}, got {value!r}"
        )


def check_count(config: Any, name: str, *, optional: bool = False) -> None:
    """Raises ValueError unless the field `name` is an int of at least 1 (or None)."""
    value = getattr(config, name)
    if value is None and optional:
        return
    if type(value) is not int or value < 1:
        raise ValueError(f"{type(config).__name__}.{name} must be an int >= 1, got {value!r}")
