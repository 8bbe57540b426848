"""Two pictures of a benchmark run: how many times faster, and how much less memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"eager": "#c44e52", "compiled": "#dd8452"}
OF_PEERS = ("#4c72b0", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def last_passes(rows: list[dict]) -> list[dict]:
    """Of every operation, shape and dtype the most that was measured: with backward if it has."""
    last = {(r["operation"], r["shape"], r["dtype"]): r["pass"] for r in rows}
    return [r for r in rows if last[r["operation"], r["shape"], r["dtype"]] == r["pass"]]


def _bars(rows: list[dict], value, title: str, label: str, path: Path) -> None:
    others = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != "fused"))
    peers = [o for o in others if o not in COLOURS]
    colours = COLOURS | {o: OF_PEERS[i % len(OF_PEERS)] for i, o in enumerate(peers)}
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        case = cases.setdefault((r["operation"], r["shape"], r["dtype"], r["pass"]), {})
        case[r["variant"]] = r
    bars = {
        case: {o: value(of[o], of["fused"]) for o in others if o in of and "fused" in of}
        for case, of in cases.items()
    }
    bars = {case: numbers for case, numbers in bars.items() if any(numbers.values())}
    height = 1.4 + 0.19 * sum(len(numbers) + 1 for numbers in bars.values())
    figure, axis = plt.subplots(figsize=(10, height))
    names, position = [], 0.0
    for case, numbers in bars.items():
        middle = position + (len(numbers) - 1) / 2
        for other, number in numbers.items():
            if number:
                axis.barh(position, number - 1, left=1, color=colours[other], height=0.9)
                axis.text(number, position, f" {number:.3g}", va="center", fontsize=7)
            position += 1
        names.append((middle, f"{case[0]}\n{case[1]}, {case[2]}, {case[3]}"))
        position += 0.8
    axis.set_ylim(-1, position)
    axis.set_yticks([n[0] for n in names], [n[1] for n in names], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[o]) for o in others]
    axis.legend(handles, others, loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw(rows: list[dict], stem: Path) -> None:
    """Writes STEM-speed.png (PyTorch on huge pages, its best) and STEM-memory.png."""
    rows = last_passes(rows)
    best = [r for r in rows if r["pages"] == "huge pages"] or rows
    where = f"{rows[0]['machine']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"

    def speed(row: dict, fused: dict) -> float:
        return float(row["fused_speedup"])

    def memory(row: dict, fused: dict) -> float | None:
        """None where both need less than the resolution of the measurement is good for."""
        theirs, ours = float(row["extra_mib"]), float(fused["extra_mib"])
        return max(theirs, 0.1) / max(ours, 0.1) if max(theirs, ours) >= 1 else None

    _bars(
        best, speed, f"Time divided by the fused kernel's (PyTorch on huge pages)\n{where}",
        "times as long as the fused kernel", stem.with_name(stem.name + "-speed.png"),
    )  # fmt: skip
    installed = [r for r in rows if r["pages"] == "installed"] or rows
    _bars(
        installed, memory, f"Peak extra memory divided by the fused kernel's\n{where}",
        "times as much memory beyond inputs and results", stem.with_name(stem.name + "-memory.png"),
    )  # fmt: skip
