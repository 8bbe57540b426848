"""The tables of the README: operations x backends from the registry, speed from a CSV.

python benchmarks/readme.py        rewrites them in README.md and docs/benchmarks.md

The README shows of every shape the most that was measured, docs/benchmarks.md everything.
"""

from __future__ import annotations

import csv
import inspect
import re
import sys
from pathlib import Path

import plots
from apt_kernels.registry import OPS, Op

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
OPERATIONS = ROOT / "docs" / "operations.md"
RESULTS = ROOT / "benchmarks" / "results" / "kernels-cpu.csv"


def operations_table() -> str:
    """One row an operation. Read from the sources, so it does not depend on what is built here."""
    lines = [
        "| operation | what it computes | C++ (CPU) | CUDA C++ | Triton | source |",
        "|---|---|---|---|---|---|",
    ]

    native = "".join(path.read_text() for path in (ROOT / "csrc/bindings").glob("*/*.cpp"))
    cuda = (ROOT / "csrc/bindings/cuda.cpp").read_text()
    triton = (ROOT / "apt_kernels/triton/__init__.py").read_text()

    def there(op: Op, bound: str) -> str:
        """Whether all its kernels are bound or exported (a composition has those of others)."""
        return "yes" if all(re.search(rf"\b{name}\b", bound) for name in op.kernels) else "–"

    for name, op in sorted(OPS.items()):
        cells = " | ".join(there(op, bound) for bound in (native, cuda, triton))
        lines.append(f"| `{name}` | {op.summary} | {cells} | {op.source} |")
    return "\n".join(lines)


def measured_table(whole: bool = False, path: Path = RESULTS) -> str:
    """Median milliseconds, and how many times as long the others take: installed / huge pages."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = rows if whole else [r for r in plots.last_passes(rows) if _headline(r)]
    keys = dict.fromkeys((r["operation"], r["shape"], r["dtype"], r["pass"]) for r in shown)
    cell = {
        (r["operation"], r["shape"], r["dtype"], r["pass"], r["variant"], r["pages"]): r
        for r in rows
    }

    def pair(key: tuple, variant: str, field: str) -> str:
        values = [cell.get((*key, variant, pages)) for pages in ("installed", "huge pages")]
        return " / ".join(v[field] if v else "–" for v in values) if any(values) else "–"

    def peers(key: tuple) -> str:
        names = dict.fromkeys(k[4] for k in cell if k[:4] == key)
        others = [n for n in names if n not in ("fused", "eager", "compiled")]
        return ", ".join(f"{n} {pair(key, n, 'fused_speedup')}" for n in others) or "–"

    lines = [
        "| operation | shape, dtype, pass | fused ms | eager × | compiled × | others × | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in keys:
        eager, compiled = (pair(key, v, "fused_speedup") for v in ("eager", "compiled"))
        memory = [
            cell.get((*key, v, "installed"), {}).get("extra_mib", "–") for v in ("fused", "eager")
        ]
        lines.append(
            f"| `{key[0]}` | {key[1]}, {key[2]}, {key[3]} | {pair(key, 'fused', 'ms')} | {eager} | "
            f"{compiled} | {peers(key)} | {', '.join(memory)} |"
        )
    where = dict.fromkeys(
        f"{r['machine']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}, "
        f"{r['date']}"
        for r in rows
    )
    lines += [
        "",
        f"{'; '.join(where)}; `{path.relative_to(ROOT)}`. Each pair is PyTorch as installed / on "
        "huge pages (`THP_MEM_ALLOC_ENABLE=1`); × is the time divided by ours; MiB is the peak "
        "beyond inputs and results, ours and eager's.",
    ]
    return "\n".join(lines)


# The rows of the README: one for each kind of work.
HEADLINES = (
    ("token_logprobs", "1024 x 32000"),
    ("linear_token_logprobs", "1024 x 576 x 49152"),
    ("linear_cross_entropy", "2048 x 768 x 30522, 15 % labelled, eager on all rows"),
    ("linear_policy_loss", "1024 x 576 x 49152"),
    ("policy_loss", "64 x 2048"),
    ("gae", "256 x 1024"),
    ("nt_xent", "2 x 4096 views, D = 128"),
    ("mlm_mask", "256 x 512"),
)


def _headline(row: dict[str, str]) -> bool:
    chosen = (row["operation"], row["shape"]) in HEADLINES
    return chosen and row["dtype"] in ("float32", "int64")


def operations_page() -> str:
    """docs/operations.md: the signature and the docstring of every operation."""
    lines = [
        "# Operations",
        "",
        "Written by `benchmarks/readme.py` from the signatures and docstrings. These rules hold",
        "for every operation: a mask is named by what True means, and True counts; masked slots",
        "may hold anything and get exactly no gradient; results are float32 (float64 for",
        "float64 inputs); gradients are computed once. On the CPU `token_logprobs`,",
        "`linear_token_logprobs`, `sequence_logps` and `linear_cross_entropy` with",
        "`reduction='none'` give a row the same bits in any batch, beside any padding, with any",
        "number of threads.",
        "",
    ]
    for name, op in sorted(OPS.items()):
        signature = str(inspect.signature(op.function)).replace("torch.Tensor", "Tensor")
        signature = re.sub(r"\b(torch|apt_kernels)\.[\w.]*\.", "", signature).replace("'", "")
        lines += [f"## `{name}`", "", "```python", f"{name}{signature}", "```", ""]
        lines += ["```text", inspect.getdoc(op.function), "```", ""]
    return "\n".join(lines)


def benchmarks_page() -> str:
    stem = RESULTS.with_suffix("").name
    return "\n".join(
        [
            "# Every measured figure",
            "",
            "Written by `benchmarks/readme.py` from the file that `make bench` writes. Medians of",
            "alternating runs; below 1 the other side is faster.",
            "",
            measured_table(whole=True),
            "",
            *(f"![{what}](../benchmarks/results/{stem}-{what}.png)" for what in PICTURES),
            "",
        ]
    )


PICTURES = ("speed", "memory")
TABLES = {"operations": operations_table, "measured": measured_table}


def marked(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by benchmarks/readme.py -->", f"<!-- end of {name} -->"


def section(text: str, name: str) -> str:
    """What stands between the marks of a table."""
    begin, end = marked(name)
    return text.split(begin, 1)[1].split(end, 1)[0].strip()


def main() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        begin, end = marked(name)
        if begin not in text or end not in text:
            sys.exit(f"{README}: expected the marks {begin} and {end}")
        before, rest = text.split(begin, 1)
        after = rest.split(end, 1)[1]
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    README.write_text(text)
    BENCHMARKS.write_text(benchmarks_page())
    OPERATIONS.write_text(operations_page())


if __name__ == "__main__":
    main()
