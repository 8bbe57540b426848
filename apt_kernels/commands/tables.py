"""Tables: aligned and coloured on a terminal, and CSV files."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

FIELDS = (
    "operation", "shape", "dtype", "pass", "variant", "threads", "axis", "size", "ms", "ms_p20",
    "ms_p80", "fused_speedup", "ratio", "gb_per_s", "extra_mib", "machine", "torch", "version",
    "date",
)  # fmt: skip
CASE = ("operation", "shape", "dtype", "pass", "threads", "size")
GREEN, RED, BOLD = "32", "31", "1"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the columns of the rows below one another; the last column is not padded."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def has_colours() -> bool:
    """On a terminal that does not say NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_colours() else text


def cases(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """The rows of every case by the name of their side."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in CASE), {})[row["variant"]] = row
    return found


def results_table(rows: list[dict]) -> list[str]:
    """One line a side: green where our function is faster than it, red where it is slower."""
    header = ("operation, shape, dtype, pass, threads", "side", "ms", "x ours", "GB/s", "MiB")
    cells, colours = [header], [BOLD]
    for (operation, shape, dtype, passes, threads, size), sides in cases(rows).items():
        name = f"{operation} {shape} {dtype} {passes} {threads}t"
        name += f" {next(iter(sides.values()))['axis']}={size}" if size else ""
        for side, row in sides.items():
            ours = side == "fused"
            cells.append(
                (
                    name,
                    "ours" if ours else side,
                    row["ms"],
                    "" if ours else row["fused_speedup"],
                    row["gb_per_s"] or "-",
                    row["extra_mib"],
                )
            )
            colours.append("" if ours else GREEN if float(row["fused_speedup"]) >= 1 else RED)
            name = ""
    lines = aligned(cells)
    return [coloured(line, code) if code else line for line, code in zip(lines, colours)]


def legend(rows: list[dict]) -> str:
    """How to read the columns of the table."""
    kinds = " or ".join(dict.fromkeys(row["ratio"] for row in rows if row["variant"] != "fused"))
    return (
        "ms: median. x ours: time of that side divided by ours"
        f"{f', {kinds}' if kinds else ''}; above 1 ours is faster. "
        "MiB: peak beyond inputs and results."
    )


def read(path: Path) -> list[dict]:
    """The rows of a file that `bench` wrote."""
    if not path.is_file():
        raise ValueError(f"--compare: expected a CSV file that bench wrote, got {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(FIELDS) - set(reader.fieldnames or ()))
        if missing:
            raise ValueError(f"{path}: expected the columns of bench, got none named {missing}")
        return list(reader)


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def compared(rows: list[dict], earlier: list[dict]) -> list[tuple[str, str, str, str, str]]:
    """Case, milliseconds before and now, their ratio, and "better" or "worse" beyond the noise.

    The noise: the times between the 20th and the 80th percentile of both runs overlap.
    """
    known, found = cases(earlier), []
    for case, sides in cases(rows).items():
        now, before = sides.get("fused"), known.get(case, {}).get("fused")
        if now is None or before is None:
            continue
        lower = float(now["ms_p80"]) < float(before["ms_p20"])
        higher = float(now["ms_p20"]) > float(before["ms_p80"])
        verdict = "better" if lower else "worse" if higher else ""
        ratio = float(now["ms"]) / float(before["ms"])
        found.append((" ".join(case).rstrip(), before["ms"], now["ms"], f"{ratio:.3g}", verdict))
    return found


def comparison_table(rows: list[dict], earlier: list[dict]) -> list[str]:
    """Our times now beside an earlier run: green where they are better beyond the noise."""
    found = compared(rows, earlier)
    header = ("operation, shape, dtype, pass, threads", "ms before", "ms now", "now / before")
    codes = {"better": GREEN, "worse": RED, "": ""}
    lines = aligned([header, *(row[:4] for row in found)])
    codes = [BOLD, *(codes[row[4]] for row in found)]
    return [coloured(line, code) if code else line for line, code in zip(lines, codes)]
