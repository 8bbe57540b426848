"""One HTML page of a run, with its pictures inside: it needs no other file and no network."""

from __future__ import annotations

import html
from pathlib import Path

from . import charts, tables

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } svg { max-width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
.grid { stroke: var(--line) } .facts { opacity: .75 }
.sides span { margin-right: 1.2em } .sides i { display: inline-block; width: .8em; height: .8em }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line) }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.better { color: #1a8f4c } .worse { color: #d33 }
.scroll { overflow-x: auto } .curves { display: flex; flex-wrap: wrap; gap: 1rem }
"""
PICTURES = {
    "Time": ("ms", "ms", "Median milliseconds; shorter is better."),
    "Bandwidth": ("gb_per_s", "GB/s", "Bytes that must move, divided by the time."),
    "Memory": ("extra_mib", "MiB", "Peak beyond inputs and results; shorter is better."),
}


def write(path: Path, rows: list[dict], earlier: list[dict]) -> None:
    """Writes the page of these rows, and of how they differ from those of an earlier run."""
    colour = charts.colours(rows)
    parts = [_head(rows), _sides(rows, colour)]
    for title, (field, unit, meaning) in PICTURES.items():
        figures = charts.bars_of(rows, field, unit)
        if figures:
            parts.append(f"<h2>{title}</h2><p>{meaning}</p>")
        for family, of_family in figures.items():
            pictures = "\n".join(charts.bar_chart(bars, colour) for bars in of_family)
            parts.append(f"<h3>{family}</h3>\n{pictures}")
    parts.append(_scaling(rows, colour))
    parts.append(_comparison(rows, earlier))
    parts.append(_table(rows))
    title = "apt-kernels bench"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


def _head(rows: list[dict]) -> str:
    facts = dict.fromkeys(
        f"{r['machine']}, threads: {r['threads']}, PyTorch {r['torch']}, apt_kernels "
        f"{r['version']}, {r['date']}"
        for r in rows
    )
    lines = "<br>".join(map(html.escape, facts))
    return f'<p class="facts">{lines}<br>{html.escape(tables.legend(rows))}</p>'


def _sides(rows: list[dict], colour: dict[str, str]) -> str:
    names = dict.fromkeys(row["variant"] for row in rows)
    spans = (
        f'<span><i style="background:{colour[n]}"></i> '
        f"{'ours' if n == 'fused' else html.escape(n)}</span>"
        for n in names
    )
    return f'<p class="sides">{"".join(spans)}</p>'


def _scaling(rows: list[dict], colour: dict[str, str]) -> str:
    lines: dict[tuple, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["size"]:
            key = tuple(row[f] for f in ("operation", "shape", "dtype", "pass", "threads", "axis"))
            points = lines.setdefault(key, {}).setdefault(row["variant"], [])
            points.append((float(row["size"]), float(row["ms"])))
    if not lines:
        return ""
    figures = (
        f"<figure><figcaption>{html.escape(', '.join(key[:4]))}, threads: {key[4]}</figcaption>"
        f"{charts.curves(series, colour, key[5])}</figure>"
        for key, series in lines.items()
    )
    return f'<h2>Scaling</h2><div class="curves">{"".join(figures)}</div>'


def _comparison(rows: list[dict], earlier: list[dict]) -> str:
    if not earlier:
        return ""
    compared = tables.compared(rows, earlier)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{before}</td><td>{now}</td>"
        f'<td class="{verdict}">{ratio}</td></tr>'
        for name, before, now, ratio, verdict in compared
    )
    head = "<tr><th>case</th><th>ms before</th><th>ms now</th><th>now / before</th></tr>"
    meaning = "Coloured where the middle 60 % of both runs' times do not overlap."
    return f"<h2>Against the earlier run</h2><p>{meaning}</p><table>{head}{body}</table>"


def _table(rows: list[dict]) -> str:
    fields = [f for f in tables.FIELDS if any(row[f] for row in rows)]
    fields = [f for f in fields if f not in ("machine", "torch", "version", "date")]
    head = "".join(f"<th>{field}</th>" for field in fields)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(row[f]))}</td>' for f in fields)}</tr>"
        for row in rows
    )
    return f'<h2>All rows</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
