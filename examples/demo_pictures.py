"""The picture of the pretraining demo: embeddings before and after, and curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMOOTHED = 10  # steps that a drawn point of a curve is the mean of


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws every part of the demo that has results into one PNG file.

    Args:
        results: by part: `before`, `after`, `metric`, `curve` and what it is a `curve_of`, and of
            digits `embedding`.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of_digits = [name for name in results if "embedding" in results[name]]
    of_texts = [name for name in results if name not in of_digits]
    rows = len(of_digits) + -(-len(of_texts) // 3)
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    place = 1
    for name in of_digits:
        result = results[name]
        for when in ("before", "after"):
            axes = figure.add_subplot(rows, 3, place)
            x, y = zip(*result["embedding"][when], strict=True)
            points = axes.scatter(x, y, c=result["embedding"]["labels"], cmap="tab10", s=4)
            axes.set_title(f"{name}, {when}: {result['metric']} {result[when]:.3f}", fontsize=10)
            if when == "before":
                axes.legend(*points.legend_elements(), title="digit", fontsize=6, title_fontsize=6)
            axes.set_xticks([])
            axes.set_yticks([])
            place += 1
        _curve(figure.add_subplot(rows, 3, place), f"{name}: training", result)
        place += 1
    for name in of_texts:
        result = results[name]
        metric = result["metric"].removesuffix(" gained")
        title = f"{name}: {metric} {result['before']:.3f} → {result['after']:.3f}"
        _curve(figure.add_subplot(rows, 3, place), title, result)
        place += 1
    figure.savefig(path, format="png", dpi=110)


def _curve(axes: Any, title: str, result: Mapping[str, Any]) -> None:
    values = result["curve"]
    windows = [values[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(values))]
    means = [sum(window) / len(window) for window in windows]
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, linewidth=0.5, alpha=0.5, color="tab:blue", label="one step")
    axes.plot(steps, means, linewidth=1.5, color="tab:orange", label=f"mean of {SMOOTHED} steps")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(f"{result['curve_of']} of the training batch", fontsize=8)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
