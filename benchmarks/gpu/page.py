"""The results of a run as one page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import targets

PHASES = ("facts", "accuracy", "warm", "rows", "counters", "device", "sanitizer", "tuning")
MOST_FAULTS = 12  # of one section; the others are in the lines
SUMS_DIFFER = 0.02  # relative; bfloat16 has 3 digits
ROWS_HEAD = """\
Milliseconds (20 %, 80 %). A call below 1 ms is the replay of its graph; what it takes as launched
stands behind it. Floor: the larger of bytes over the copy and operations over the product, as
measured above. Targets are published or computed figures of an H200 in bfloat16.
"""
OK = ("passed", "measured", "compiled", "ran", None)


def text(records: list[dict]) -> str:
    sections = (_head, _facts, _accuracy, _rows, _counters, _device, _sanitizer, _tuning)
    return "\n\n".join("\n".join(section(records)) for section in sections) + "\n"


def _of(records: list[dict], phase: str) -> list[dict]:
    """The results of a phase; its lines that say no more than "finished" are left out."""
    lost = [r for r in records if r["phase"] == phase and r.get("status") == "lost"]
    found = [r for r in records if r["phase"] == phase and "finished" not in r]
    return found + lost if phase != "device case" else [r for r in records if r["phase"] == phase]


def _table(head: Iterable[str], rows: Iterable[Iterable]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield (
            "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |"
        )


def _faults(records: list[dict]) -> Iterator[str]:
    """Everything that did not go well, by name; nothing is left out in silence."""
    bad = [r for r in records if r.get("status") not in OK]
    absent = Counter(r["why"] for r in bad if r["status"] == "absent")
    for why, count in absent.items():
        yield f"- absent: {why} ({count} items)"
    bad = [r for r in bad if r["status"] != "absent"]
    for r in bad[:MOST_FAULTS]:
        name = r.get("variant") or r.get("sample") or ""
        yield f"- {r['status']}: `{r['item']}` {name} {r.get('pass', '')}: {r.get('why', '')[:300]}"
    if len(bad) > MOST_FAULTS:
        yield f"- and {len(bad) - MOST_FAULTS} more, in the lines of the results"


def _head(records: list[dict]) -> Iterator[str]:
    ends = {}
    for r in records:
        if r["phase"] == "session":
            ends.setdefault(r["item"], []).append(r)
    state = records[-1]["state"] if records else "nothing measured"
    yield f"# The first minutes on {_fact(records, 'GPU') or 'a processor (rehearsal)'}\n"
    commit = _fact(records, "commit")
    yield f"Written by `benchmarks/gpu/quick`; sources {state}, commit {commit}.\n"
    yield from _table(
        ("phase", "runs", "seconds of the last", "its budget", "items left"),
        (
            (name, len(ends[name]), *(ends[name][-1][k] for k in ("seconds", "budget", "left")))
            if name in ends
            else (name, 0, "–", "–", "all")
            for name in PHASES
        ),
    )


def _fact(records: list[dict], name: str) -> str | None:
    found = [r for r in _of(records, "facts") if r.get("name") == name]
    return found[-1].get("value") if found else None


def _rate(records: list[dict], name: str) -> float | None:
    found = [r for r in _of(records, "facts") if r.get("name") == name and "rate" in r]
    return found[-1]["rate"] if found else None


def _facts(records: list[dict]) -> Iterator[str]:
    yield "## Machine\n"
    known = [r for r in _of(records, "facts") if "value" in r]
    there = [r for r in known if r["value"] != "not installed"]
    absent = [r["name"] for r in known if r["value"] == "not installed"]
    yield "; ".join(f"{r['name']} {r['value']}" for r in there) + "."
    yield f"Not installed: {', '.join(absent) or 'nothing that was looked for'}."
    for name, unit, scale in (("copy", "TB/s", 1e12), ("product", "TFLOP/s", 1e12)):
        rate = _rate(records, name)
        yield f"- {name}: {f'{rate / scale:.3g} {unit}' if rate else 'not measured'}"
    yield from _faults(_of(records, "facts"))


def _accuracy(records: list[dict]) -> Iterator[str]:
    yield "## Accuracy\n\nSamples that passed of those that ran, against float64.\n"
    samples = [r for r in _of(records, "accuracy") if "sample" in r]
    columns = sorted({(r["backend"], r["dtype"]) for r in samples})
    ran = Counter((r["operation"], r["backend"], r["dtype"]) for r in samples)
    good = Counter(
        (r["operation"], r["backend"], r["dtype"]) for r in samples if r["status"] == "passed"
    )
    head = ("operation", *(f"{backend}, {dtype}" for backend, dtype in columns))
    lines = []
    for name in sorted({r["operation"] for r in samples}):
        keys = [(name, *column) for column in columns]
        cells = (f"{good[key]} / {ran[key]}" if ran[key] else "–" for key in keys)
        lines.append((f"`{name}`", *cells))
    yield from _table(head, lines)
    yield from _faults(_of(records, "accuracy"))
    yield from _faults(_of(records, "warm"))


def _rows(records: list[dict]) -> Iterator[str]:
    yield "## Rows\n"
    yield ROWS_HEAD
    measured = [r for r in _of(records, "rows") if "ms" in r]
    cases: dict[tuple, list[dict]] = {}
    for r in measured:
        cases.setdefault((r["operation"], r["shape"], r["dtype"], r["pass"]), []).append(r)
    yield from _table(
        (
            "operation",
            "shape",
            "dtype",
            "pass",
            "side",
            "ms",
            "target",
            "floor",
            "of it",
            "MiB",
            "sums",
        ),
        (_row(records, key, r, rows[0]) for key, rows in cases.items() for r in rows),
    )
    yield from _faults(_of(records, "rows"))


def _row(records: list[dict], key: tuple, r: dict, first: dict) -> tuple:
    operation, shape, dtype, part = key
    goals = targets.TARGETS.get((operation, shape, part), ()) if dtype == "bfloat16" else ()
    floor = _floor(records, r)
    launched = f"; {r['launched_ms']:.3g}" if "launched_ms" in r else ""
    return (
        f"`{operation}`", shape, dtype, part, r["variant"],
        f"{r['ms']:.3g} ({r['ms_p20']:.3g}, {r['ms_p80']:.3g}){launched}",
        " or ".join(f"{'met' if r['ms'] <= goal else 'missed'}: {goal:g}" for goal in goals) or "–",
        f"{floor:.3g}" if floor else "–", f"{100 * floor / r['ms']:.0f} %" if floor else "–",
        f"{max(0, r['extra_mib']):.0f}", _sums(r, first),
    )  # fmt: skip


def _floor(records: list[dict], r: dict) -> float | None:
    copy, product = _rate(records, "copy"), _rate(records, "product")
    if copy is None or product is None:
        return None
    times = [1e3 * r.get("bytes", 0) / copy]
    if r["dtype"] != "float32":  # the product that was measured is one of bfloat16
        times.append(1e3 * r.get("flops", 0) / product)
    return max(times) or None


def _sums(r: dict, first: dict) -> str:
    """Whether the results of a side add up to what the first side's do."""
    if r is first or not targets.benchmark(r["operation"], r["shape"]).comparable:
        return "–"
    pairs = list(zip(r["sums"], first["sums"], strict=False))
    differ = [a for a, b in pairs if abs(a - b) > SUMS_DIFFER * max(abs(a), abs(b), 1e-30)]
    return "DIFFER" if differ else "agree"


def _counters(records: list[dict]) -> Iterator[str]:
    yield "## Hardware counters\n"
    found = [r for r in _of(records, "counters") if "kernel" in r]
    about = ("phase", "item", "status", "state", "at")
    names = list(dict.fromkeys(k for r in found for k in r if k not in about))
    if found:
        yield from _table(
            ("call", *names), ((r["item"], *(r.get(n, "–") for n in names)) for r in found)
        )
    yield from _faults(_of(records, "counters"))


def _device(records: list[dict]) -> Iterator[str]:
    yield "## Tests on the device\n"
    cases = [{**r, "group": r["item"].split("[")[0]} for r in _of(records, "device case")]
    kinds = sorted({r["status"] for r in cases})
    counts = Counter((r["group"], r["status"]) for r in cases)
    groups = dict.fromkeys(r["group"] for r in cases)
    yield from _table(("test", *kinds), ((g, *(counts[g, k] for k in kinds)) for g in groups))
    yield from _faults([r for r in cases if r["status"] != "skipped"])
    yield from _faults(_of(records, "device"))


def _sanitizer(records: list[dict]) -> Iterator[str]:
    yield "## memcheck and racecheck\n"
    found = _of(records, "sanitizer")
    yield ", ".join(f"`{r['item'].replace('|', ' ')}` {r['status']}" for r in found) or "Not run."
    yield from _faults(found)


def _tuning(records: list[dict]) -> Iterator[str]:
    yield "## Tuning\n"
    found = [r for r in _of(records, "tuning") if "setting" in r]
    best: dict[str, float] = {}
    for r in found:
        if "ms" in r:
            best[r["setting"]] = min(r["ms"], best.get(r["setting"], r["ms"]))
    yield from _table(
        ("setting", "shape", "choice", "ms"),
        (
            (r["setting"], r["shape"], r["choice"], _bold(r["ms"], best[r["setting"]]))
            if "ms" in r
            else (r["setting"], r["shape"], r["choice"], "does not run")
            for r in found
        ),
    )
    yield from _faults(_of(records, "tuning"))
    yield from _preferences(records)


def _bold(ms: float, best: float) -> str:
    return f"**{ms:.4g}**" if ms == best else f"{ms:.4g}"


def _preferences(records: list[dict]) -> Iterator[str]:
    """What `PREFERENCE_OF_OPERATION` of apt_kernels/dispatch.py should say after this run."""
    cases: dict[str, dict[tuple, dict[str, float]]] = {}
    for r in _of(records, "rows"):
        if "ms" in r and r["variant"].startswith("ours: "):
            rows = cases.setdefault(r["operation"], {})
            key = r["shape"], r["dtype"], r["pass"]
            rows.setdefault(key, {})[r["variant"].removeprefix("ours: ")] = r["ms"]
    for operation, rows in cases.items():
        names = {name for row in rows.values() for name in row}
        whole = [row for row in rows.values() if set(row) == names]
        if len(names) > 1 and whole:
            sums = {name: sum(row[name] for row in whole) for name in names}
            order = [*sorted(sums, key=sums.get), "reference"]
            times = ", ".join(f"{name} {sums[name]:.4g} ms" for name in order[:-1])
            quoted = ", ".join(f'"{name}"' for name in order)
            yield f'- `{operation}`: {times}: `("{operation}", "cuda"): ({quoted})`'
