"""Rows of the data, where they stand, and the rows that cannot be used."""

from __future__ import annotations

import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

REPORTED_ROWS = 20


class BadRow(ValueError):
    """A row that cannot be used; the message says where and why."""


class NotAnObject(BadRow):
    """A row that has no columns; the message says what it is instead."""


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        place: `file:line`, or `file: row N` where a file has no lines.
        value: the columns by name; in files of lines the line; or the `BadRow` that says why the
            row could not be read.
    """

    place: str
    value: Any


def to_stderr(message: str) -> None:
    """Prints a message on stderr."""
    print(message, file=sys.stderr)


class RowReport:
    """Tells of rows that cannot be used, and counts them.

    Args:
        fail: True: the first such row is an error; False: the first `REPORTED_ROWS` are named, the
            others are counted.
        report: called with one message at a time.
        counts: where rows are counted, by what happened to them; None: nowhere.

    Attributes:
        place: where the row stands that is read now.
    """

    def __init__(
        self,
        fail: bool = False,
        report: Callable[[str], Any] = to_stderr,
        counts: Counter[str] | None = None,
    ) -> None:
        self._fail, self._report = fail, report
        self.counts = Counter() if counts is None else counts
        self.place = ""
        self._told: Counter[str] = Counter()

    def skip(self, place: str, reason: Any) -> None:
        """Leaves out a row that cannot be used.

        Raises:
            BadRow: where such rows are errors.
        """
        if self._fail:
            raise BadRow(f"{place}: {reason}")
        self.tell("rows skipped", f"{place}: {reason} (row skipped)")

    def tell(self, what: str, message: str, rows: int = 1) -> None:
        """Counts rows under `what`, and reports the message unless there were many before."""
        self.counts[what.replace(" ", "_")] += rows
        self._told[what] += 1
        if self._told[what] <= REPORTED_ROWS:
            self._report(message)

    def once(self, what: str, message: str) -> None:
        """Reports the message unless something was told under `what` before."""
        self._told[what] += 1
        if self._told[what] == 1:
            self._report(message)

    def end(self, name: str) -> None:
        """Reports how many rows were not named; begins to name them again."""
        for what, count in self._told.items():
            if count > REPORTED_ROWS and what in ("rows skipped", "rows cut", "rows dropped"):
                self._report(f"{name}: {count - REPORTED_ROWS} more {what}")
        self._told.clear()


def names_of(paths: Any) -> str:
    """Returns the names of one file or of several, for messages."""
    return ", ".join(os.fspath(path) for path in as_paths(paths))


def as_paths(paths: Any) -> list[Any]:
    """Returns one path or several as a list."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def check_text(value: Any) -> None:
    """Raises BadRow where a string, at whatever depth, is no Unicode text.

    A lone surrogate such as `"\\ud83d"` is half of a character: no tokenizer takes it.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _check_string(item)
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)


def _check_string(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[max(error.start - 10, 0) : error.start + 10])
        raise BadRow(
            f"expected Unicode text, got the lone surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start + 1} (near {shown})"
        ) from None


def is_absent(value: Any) -> bool:
    """Returns whether a column holds nothing: None, or the NaN of a table."""
    return value is None or (isinstance(value, float) and value != value)


def present(row: Mapping[str, Any], *columns: str) -> bool:
    """Returns whether a row has values in all of these columns."""
    return not any(is_absent(row.get(column)) for column in columns)


def kind_of(value: Any) -> str:
    """Returns the type of a value and its beginning, for messages."""
    text = ascii(value) if isinstance(value, (str, int, float, bool)) else ""
    return f"{type(value).__name__} {text[:40]}".strip()


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Returns the string of a column, which must not be blank.

    Raises:
        BadRow: the column is not there, or holds something else.
    """
    check_has(row, column)
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be a string, got {kind_of(value)}")
    if not value.strip():
        raise BadRow(f"{column!r} must be a string that is not empty, got {value!r}")
    return value


def check_has(row: Mapping[str, Any], *columns: str) -> None:
    """Raises BadRow that names the first of the columns that a row lacks."""
    for column in columns:
        if is_absent(row.get(column)):
            raise BadRow(f"has no {column!r}{_near(column, row)}")


def _near(column: str, row: Mapping[str, Any]) -> str:
    there = [name for name in row if not is_absent(row[name])]
    near = difflib.get_close_matches(column, there, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (its columns: {', '.join(there[:8]) or 'none'})"


def unused_columns(columns: Iterable[str], used: Collection[str]) -> str:
    """Returns a message that names the columns that nothing reads; empty where there are none."""
    messages = []
    for column in columns:
        if column not in used:
            near = difflib.get_close_matches(column, used, n=1)
            messages.append(f"{column!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"columns that are not used: {', '.join(messages)}" if messages else ""


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns a row whose columns have the names that are read.

    Args:
        row: the columns by their names in the file.
        columns: for a name that is read its name in the file; the column is there under both.
    """
    return {**row, **{name: row.get(theirs) for name, theirs in columns.items()}}
