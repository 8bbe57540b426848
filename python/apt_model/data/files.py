"""Rows of files: JSON lines, JSON, CSV, Parquet, Arrow, folders of `datasets`, lines of text."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .rows import BadRow, NotAnObject, Row, as_paths, check_text

JSON_LINES, JSON, CSV, PARQUET, ARROW = "json lines", "json", "csv", "parquet", "arrow"
KINDS = {
    ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".jsonlines": JSON_LINES, ".json": JSON,
    ".csv": CSV, ".tsv": CSV, ".parquet": PARQUET, ".pq": PARQUET, ".arrow": ARROW,
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz")
LINES = (".txt", ".text", *PACKED)
TRAINING, HELD_OUT = ("train",), ("validation", "valid", "dev", "eval", "test")
BOMS = (  # UTF-32 first: its little-endian mark begins as the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
REFUSED = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "packed with zstd"}
CHUNK = 1 << 20
LOOKED_AT = 4096
UNDECODED = "\udcff"  # stands for a line of a table that is not UTF-8
LINE_END: dict[type, re.Pattern] = {
    str: re.compile(r"\r\n|\n|\r"),
    bytes: re.compile(rb"\r\n|\n|\r"),
}
BLANK = re.compile(r"[\s\ufeff]*")


def is_text_path(path: Any) -> bool:
    """Returns whether a path is of rows or lines of text, as its suffix or its folder says."""
    path = Path(path)
    if path.is_dir():
        return _is_dataset(path)
    return kind_of_file(path) is not None or path.suffix.lower() in LINES


def kind_of_file(path: Path) -> str | None:
    """Returns the kind of a file by the suffix before `.gz` and the like; None: lines of text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_rows(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    lines_are_rows: bool = False,
    splits: tuple[str, ...] = TRAINING,
) -> Iterator[Row]:
    """Yields the rows of one file or of several, each with its place.

    Args:
        paths: files, told by their suffixes: `.jsonl`, `.json` (an array, or lines), `.csv`,
            `.tsv`, `.parquet`, `.arrow`, each also packed (`.gz`, `.bz2`, `.xz`); or folders that
            `datasets.save_to_disk` has made. Text is UTF-8, or what a byte-order mark says.
        lines_are_rows: True: files of other suffixes hold a text a line (and blank lines, which
            are rows too: they part documents); False: they hold JSON lines.
        splits: of a folder with several splits the first of these is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read at all; the message names it.
    """
    for path in as_paths(paths):
        path = Path(path)
        if path.is_dir():
            yield from _table_rows(path, _dataset_batches(path, splits))
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        else:
            yield from _file_rows(path, lines_are_rows)


def _file_rows(path: Path, lines_are_rows: bool) -> Iterator[Row]:
    kind = kind_of_file(path)
    if path.stat().st_size == 0:
        return iter(())
    if kind == PARQUET:
        return _table_rows(path, _parquet_batches(path))
    if kind == ARROW:
        return _table_rows(path, _arrow_batches(path))
    if kind == CSV:
        return _csv_rows(path)
    if kind is None and lines_are_rows:
        return _text_rows(path)
    return _json_rows(path)


# Bytes and text


def _opened(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, meaning in REFUSED.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {meaning}: unpack it")
    for magic, opener in OPENERS.items():
        if head.startswith(magic):
            return opener(path, "rb")
    return open(path, "rb")


def _chunks(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        while True:
            try:
                chunk = file.read(CHUNK)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: damaged archive: {error}") from None
            if not chunk:
                return
            yield chunk


def _encoding(path: Path) -> tuple[str, int]:
    """Returns the encoding that the byte-order mark of a file says, and the length of the mark."""
    head = next(_chunks(path), b"")[:LOOKED_AT]
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding, len(mark)
    zeros = [head[place::2].count(0) for place in (0, 1)]
    if max(zeros) >= max(1, len(head) // 8):
        raise ValueError(
            f"{path}: expected UTF-8, or a byte-order mark that names another encoding; got zero "
            f"bytes as UTF-16 and UTF-32 have them. Convert the file (iconv -t UTF-8)"
        )
    return "utf-8", 0


def _lines(path: Path) -> Iterator[str | BadRow]:
    """Yields the lines of a file without their ends (LF, CR LF or CR)."""
    encoding, mark = _encoding(path)
    if encoding == "utf-8":
        for line in _split(_without_mark(_chunks(path), mark), b""):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                yield BadRow(
                    f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}; "
                    "convert the file (iconv -t UTF-8)"
                )
    else:
        yield from _split(_decoded(path, encoding, mark), "")


def _without_mark(chunks: Iterator[bytes], mark: int) -> Iterator[bytes]:
    for number, chunk in enumerate(chunks):
        yield chunk if number else chunk[mark:]


def _decoded(path: Path, encoding: str, mark: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for chunk in _without_mark(_chunks(path), mark):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {encoding.upper()}: {error.reason}") from None


def _split(chunks: Iterator[Any], empty: Any) -> Iterator[Any]:
    """Yields lines; a CR at a chunk's end may be half of a line end."""
    end = LINE_END[type(empty)]
    carriage_return = "\r" if empty == "" else b"\r"
    parts: list[Any] = []
    for chunk in chunks:
        if parts and parts[-1].endswith(carriage_return):
            chunk = parts.pop() + chunk
        held = chunk.endswith(carriage_return)
        *lines, rest = end.split(chunk[:-1] if held else chunk)
        for line in lines:
            yield empty.join([*parts, line])
            parts = []
        parts.append(rest + carriage_return if held else rest)
    text = empty.join(parts)
    if text:
        *lines, rest = end.split(text)
        yield from lines
        if rest:
            yield rest


# Kinds of files


def _text_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if isinstance(line, str):
            line = _checked_line(line)
        yield Row(f"{path}:{number}", line)


def _checked_line(line: str) -> str | BadRow:
    if "\0" in line:
        return BadRow(f"expected text, got a NUL character at character {line.index(chr(0)) + 1}")
    try:
        check_text(line)
    except BadRow as error:
        return error
    return line


def _json_rows(path: Path) -> Iterator[Row]:
    if _is_of_values(path):
        yield from _json_values(path)
        return
    for number, line in enumerate(_lines(path), start=1):
        if isinstance(line, BadRow):
            yield Row(f"{path}:{number}", BadRow(f"not JSON: {line}"))
        elif not BLANK.fullmatch(line):
            yield Row(f"{path}:{number}", _as_row(_parsed(line)))


def _is_of_values(path: Path) -> bool:
    """Returns whether a file holds an array of rows, or rows of several lines, not JSON lines."""
    lines = (line for line in _lines(path) if isinstance(line, BadRow) or line.strip())
    first = next(lines, "")
    value = _parsed(first)
    if isinstance(value, list) or (isinstance(value, dict) and kind_of_file(path) == JSON):
        held = isinstance(value, list) or _held_rows(value) is not None
        return held and next(lines, None) is None
    if isinstance(first, BadRow) or not isinstance(value, BadRow):
        return False
    if first.lstrip("\ufeff \t").startswith("["):
        return True
    return kind_of_file(path) == JSON and _begins_with_value(path)


def _after_blanks(text: str, place: int = 0) -> int:
    match = BLANK.match(text, place)
    assert match is not None  # the pattern matches nothing, too
    return match.end()


def _begins_with_value(path: Path) -> bool:
    try:
        text = _whole_text(path)
        _DECODER.raw_decode(text, _after_blanks(text))
    except (ValueError, RecursionError):
        return False
    return True


def _whole_text(path: Path) -> str:
    lines = []
    for number, line in enumerate(_lines(path), start=1):
        if isinstance(line, BadRow):
            raise ValueError(f"{path}:{number}: {line}")
        lines.append(line)
    return "\n".join(lines)


def _held_rows(value: Any) -> str | None:
    """Returns the key under which an object holds rows, as `{"data": [{...}, ...]}` does."""
    if not isinstance(value, dict):
        return None
    for key in ("data", "rows", "examples", "instances", "train"):
        held = value.get(key)
        if isinstance(held, list) and held and all(isinstance(row, dict) for row in held):
            return key
    return None


def _json_values(path: Path) -> Iterator[Row]:
    """Yields the rows of an array, or rows one after the other, each of one or more lines."""
    text = _whole_text(path)
    place = _after_blanks(text)
    in_array = text.startswith("[", place)
    place += in_array
    line = counted = 0
    while (place := _after_blanks(text, place)) < len(text):
        line, counted = line + text.count("\n", counted, place), place
        if in_array and text[place] == "]":
            in_array, place = False, place + 1
            continue
        where = f"{path}:{line + 1}"
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {_reason(error)}; the rest cannot be read") from None
        key = _held_rows(value)
        for row in [value] if key is None else value[key]:
            yield Row(where, _as_row(row))
        place = _after_blanks(text, place)
        if in_array and text.startswith(",", place):
            place += 1
        elif in_array and not text.startswith("]", place):
            raise ValueError(f"{where}: not JSON: expected ',' or ']' behind this row")
    if in_array:
        raise ValueError(f"{path}: not JSON: the array of rows has no end")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counted = Counter(key for key, _ in pairs)
        twice = next(key for key, times in counted.items() if times > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _parsed(line: Any) -> Any:
    """Returns the value of a JSON text, or the `BadRow` that says why there is none."""
    if isinstance(line, BadRow):
        return line
    try:
        return _DECODER.decode(line.strip().lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        return BadRow(_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    return f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def _as_row(value: Any) -> Any:
    """Returns a row of checked strings, or the `BadRow` that says what is wrong with it."""
    if isinstance(value, BadRow):
        return value
    if not isinstance(value, dict):
        return NotAnObject(type(value).__name__)
    try:
        check_text(value)
    except BadRow as error:
        return error
    return value


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a table of text; a cell without text is None."""
    csv.field_size_limit(sys.maxsize)
    ended = _with_ends(path)
    first = next(ended, "")
    separator = _separator(path, first)
    reader = csv.reader(_chained(first, ended), delimiter=separator, strict=True)
    columns: list[str] = []
    number = 1
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{begin}: not CSV: {error}") from None
        if not cells or not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}:{begin}: a column has its name twice: {columns}")
            continue
        number += 1
        yield Row(f"{path}:{begin}", _cells(columns, cells))


def _cells(columns: list[str], cells: list[str]) -> Any:
    if cells == [UNDECODED]:
        return BadRow("not UTF-8; convert the file (iconv -t UTF-8)")
    if len(cells) != len(columns):
        return BadRow(f"has {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})")
    values = zip(columns, cells, strict=True)
    row = _as_row({column: cell if cell.strip() else None for column, cell in values})
    if isinstance(row, dict) and any("\0" in cell for cell in cells):
        return BadRow("expected text, got a NUL character")
    return row


def _with_ends(path: Path) -> Iterator[str]:
    for line in _lines(path):
        yield (line if isinstance(line, str) else UNDECODED) + "\n"


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _separator(path: Path, header: str) -> str:
    if ".tsv" in [suffix.lower() for suffix in path.suffixes]:
        return "\t"
    return next((mark for mark in (",", ";", "\t") if mark in header), ",")


# Tables


def _table_rows(path: Path, batches: Iterator[list[Mapping[str, Any]]]) -> Iterator[Row]:
    number = 0
    for rows in batches:
        for row in rows:
            number += 1
            yield Row(f"{path}: row {number}", _as_row(dict(row)))


def _parquet_batches(path: Path) -> Iterator[list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not Parquet that can be read: {_line(error)}") from None


def _arrow_batches(path: Path) -> Iterator[list[Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(os.fspath(path)) as source:
            try:
                batches = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(source)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            for batch in batches:
                yield batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not an Arrow table that can be read: {_line(error)}") from None


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _dataset_batches(folder: Path, splits: tuple[str, ...]) -> Iterator[list[Any]]:
    if not _is_dataset(folder):
        names = sorted(p.name for p in folder.iterdir() if kind_of_file(p) or p.suffix in LINES)
        found = f"name the files in it ({', '.join(names[:5])})" if names else "it holds no data"
        raise ValueError(f"{folder} is a folder, but not one of datasets.save_to_disk: {found}")
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(os.fspath(folder))
    if isinstance(loaded, DatasetDict):
        wanted = [name for name in splits if name in loaded]
        if not wanted and len(loaded) != 1:
            raise ValueError(
                f"{folder} holds the splits {', '.join(loaded)}: name the folder of one of them, "
                f"such as {folder / next(iter(loaded))}"
            )
        loaded = loaded[wanted[0] if wanted else next(iter(loaded))]
    for table in loaded.with_format("arrow").iter(batch_size=1000):
        yield table.to_pylist()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
