"""Pictures of a run: bars and curves as SVG, and a PNG where matplotlib is installed."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..registry import OPS
from .tables import cases

COLOURS = {"fused": "#2a6fbb", "eager": "#c44e52", "compiled": "#dd8452"}
OF_PEERS = ("#55a868", "#8172b3", "#937860", "#da8bc3", "#17becf", "#bcbd22", "#8c8c8c")
MOST_ROWS = 12  # of one figure
LABELS, BARS, VALUES, BAR, GAP = 330, 520, 110, 13, 12  # pixels


class Bar(NamedTuple):
    """One bar: the label of its group, the side it is of, its length and the text at its end."""

    group: str
    side: str
    value: float
    text: str


def colours(rows: list[dict]) -> dict[str, str]:
    """A colour for every side, the same in every picture of a run."""
    peers = dict.fromkeys(row["variant"] for row in rows if row["variant"] not in COLOURS)
    return COLOURS | {peer: OF_PEERS[i % len(OF_PEERS)] for i, peer in enumerate(peers)}


def family(operation: str) -> str:
    return OPS[operation].function.__module__.split(".")[2]


def bars_of(rows: list[dict], field: str, unit: str) -> dict[str, list[list[Bar]]]:
    """For every family its figures of at most MOST_ROWS groups, of a column of the results."""
    found: dict[str, list[list[Bar]]] = {}
    for (operation, shape, dtype, passes, threads, size), sides in cases(rows).items():
        if size or not any(float(row[field] or 0) for row in sides.values()):
            continue
        label = f"{operation} {shape}, {dtype}, {passes}, {threads}t"
        group = [
            Bar(label, side, float(row[field]), f"{float(row[field]):.3g} {unit}")
            for side, row in sides.items()
            if row[field] != ""
        ]
        found.setdefault(family(operation), []).append(group)
    return {
        name: [
            list(chain.from_iterable(groups[i : i + MOST_ROWS]))
            for i in range(0, len(groups), MOST_ROWS)
        ]
        for name, groups in found.items()
    }


def bar_chart(bars: Sequence[Bar], colour: dict[str, str]) -> str:
    """An SVG of horizontal bars with logarithmic lengths."""
    positive = [bar.value for bar in bars if bar.value > 0]
    low = 10 ** math.floor(math.log10(min(positive)) - 0.05)
    high = 10 ** math.ceil(math.log10(max(positive)) + 0.05)
    scale = BARS / math.log10(high / low)
    lines, y, group = [], 8.0, None
    for bar in bars:
        if bar.group != group:
            y += GAP if group else 0
            lines.append(_text(LABELS - 8, y + BAR - 3, _short(bar.group), "end", bar.group))
            group = bar.group
        width = max(1.0, math.log10(max(bar.value, low) / low) * scale)
        title = html.escape(f"{bar.group}: {bar.side} {bar.text}")
        lines.append(
            f'<rect x="{LABELS}" y="{y:.0f}" width="{width:.1f}" height="{BAR - 2}" '
            f'fill="{colour[bar.side]}"><title>{title}</title></rect>'
        )
        lines.append(_text(LABELS + width + 5, y + BAR - 4, bar.text, "start"))
        y += BAR
    grid = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y:.0f}" class="grid"/>'
        + _text(x, y + 14, f"{10.0**power:g}", "middle")
        for power in range(round(math.log10(low)), round(math.log10(high)) + 1)
        for x in [LABELS + (power - math.log10(low)) * scale]
    ]
    return _svg(LABELS + BARS + VALUES, y + 20, [*grid, *lines])


def curves(series: dict[str, list[tuple[float, float]]], colour: dict[str, str], axis: str) -> str:
    """An SVG of milliseconds over the size of an axis, both logarithmic."""
    points = [point for line in series.values() for point in line]
    across = _scaled([x for x, _ in points], 60, 520)
    up = _scaled([y for _, y in points], 240, 20)
    lines = [
        f'<line x1="60" x2="520" y1="{up(y):.0f}" y2="{up(y):.0f}" class="grid"/>'
        + _text(54, up(y) + 4, f"{y:.3g}", "end")
        for y in {min(y for _, y in points), max(y for _, y in points)}
    ]
    for x in sorted({x for x, _ in points}):
        lines.append(_text(across(x), 258, f"{x:g}", "middle"))
    for side, line in series.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour[side]}" stroke-width="2"/>'
        )
        lines += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour[side]}">'
            f"<title>{html.escape(f'{side}: {axis} = {x:g}, {y:.3g} ms')}</title></circle>"
            for x, y in line
        ]
    lines.append(_text(290, 276, f"{axis} (milliseconds upwards)", "middle"))
    return _svg(560, 286, lines)


def _scaled(values: list[float], begin: float, end: float) -> Callable[[float], float]:
    """A logarithmic scale of the values onto pixels."""
    low, high = math.log(min(values)), math.log(max(values))
    span = max(high - low, 1e-9)
    return lambda value: begin + (math.log(value) - low) / span * (end - begin)


def _short(text: str, most: int = 52) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, title: str = "") -> str:
    title = f"<title>{html.escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{html.escape(text)}{title}</text>"


def _svg(width: float, height: float, lines: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">'
    return "\n".join([head, *lines, "</svg>"])


def draw_png(path: Path, rows: list[dict]) -> bool:
    """Draws how many times as long the other sides take; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = [f for of in bars_of(rows, "fused_speedup", "x").values() for f in of]
    figures = figures or [[Bar(r["shape"], r["variant"], 1.0, "") for r in rows[:MOST_ROWS]]]
    colour = colours(rows)
    heights = [1 + 0.2 * len(bars) for bars in figures]
    figure, axes = pyplot.subplots(
        len(figures), figsize=(11, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, bars in zip(axes.flat, figures, strict=True):
        _draw_bars(axis, bars, colour)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _draw_bars(axis, bars: list[Bar], colour: dict[str, str]) -> None:
    places, labels = range(len(bars)), dict.fromkeys(bar.group for bar in bars)
    axis.barh(places, [b.value for b in bars], color=[colour[b.side] for b in bars])
    for place, bar in zip(places, bars, strict=True):
        axis.text(bar.value, place, f" {bar.side} {bar.text}", va="center", fontsize=7)
    firsts = [next(i for i, bar in enumerate(bars) if bar.group == label) for label in labels]
    axis.set_yticks(firsts, [_short(label) for label in labels], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("time divided by ours", fontsize=8)
