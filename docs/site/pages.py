"""Hook of mkdocs: pages that are made of the registry, the sources and files outside of docs/.

One page an operation: its docstring, the cost that its C++ kernel states, an example that the
tests execute, its promise of bits and the measured rows.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from apt_kernels.registry import OPS, Op

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kernels-cpu.csv"
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# Pages that are one section of another: a page's title, the file in docs/ and the heading.
SECTIONS = {
    "output-files.md": ("Output files", "training.md", "What a run leaves"),
    "environment.md": ("Environment variables", "installing.md", "Environment variables"),
}
SAME_BITS = ("token_logprobs", "linear_token_logprobs", "sequence_logps", "linear_cross_entropy")
PICTURE = re.compile(r"!\[[^]]*\]\(\.\./(benchmarks/results/[\w-]+\.png)\)")


def on_config(config: Any) -> Any:
    """Puts the pages of the operations into the navigation, a section a family."""
    families: dict[str, list[dict[str, str]]] = {}
    for name, op in sorted(OPS.items()):
        families.setdefault(family(op), []).append({name: f"operations/{name}.md"})
    for entry in config.nav:
        if "Operations" in entry:
            entry["Operations"] = [
                {"All operations": "operations/index.md"},
                *({name.capitalize(): pages} for name, pages in families.items()),
            ]
    if (ROOT / "docs" / "integrations.md").exists():
        config.nav.insert(3, {"Integrations": "integrations.md"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, (title, source, heading) in SECTIONS.items():
        content = f"# {title}\n\n{section(source, heading)}\n"
        files.append(File.generated(config, page, content=content))
    files.append(File.generated(config, "operations/index.md", content=index()))
    for name, op in OPS.items():
        files.append(File.generated(config, f"operations/{name}.md", content=page_of(op)))
    pictures = set(PICTURE.findall((ROOT / "docs" / "benchmarks.md").read_text()))
    for picture in sorted(pictures):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that are right in the repository, as the site needs them."""
    markdown = re.sub(r"\]\(\.\./(benchmarks/results/[\w-]+\.png)", r"](\1", markdown)
    for target, source in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}(#[\w-]+)?\)", rf"]({target}\1)", markdown)
    markdown = markdown.replace("](docs/operations.md)", "](operations/index.md)")
    markdown = re.sub(r"\]\(operations\.md(#[\w-]+)?\)", "](operations/index.md)", markdown)
    markdown = re.sub(r"\]\(docs/([\w-]+\.md)", r"](\1", markdown)
    # files of the repository that are no pages keep their name alone
    return re.sub(
        r"\[([^]]+)\]\((?:\.\./)?(?:LICENSE|[\w./-]+\.(?:py|h|csv|toml))\)", r"\1", markdown
    )


def section(source: str, heading: str) -> str:
    """The text under a heading of a file in docs/."""
    text = (ROOT / "docs" / source).read_text()
    return re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.M)[
        0
    ].strip()


def family(op: Op) -> str:
    return op.function.__module__.split(".")[2]


def index() -> str:
    """The table of all operations."""
    rows = [
        f"| [`{name}`]({name}.md) | {op.summary} | {op.source} |"
        for name, op in sorted(OPS.items())
    ]
    head = ["# Operations", "", "| operation | what it computes | source |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def page_of(op: Op) -> str:
    """The page of one operation."""
    name = op.name
    example = (ROOT / "docs" / "examples" / f"{name}.py").read_text().strip()
    parts = [f"# {name}", f"{op.summary.capitalize()}. Source: {op.source}."]
    parts.append(f"::: apt_kernels.{name}")
    parts += ["## Example", f"```python\n{example}\n```"]
    formula = reference_formula(op)
    if formula:
        parts += ["## Formula", formula]
    parts += ["## Cost", re.sub(r"([*_<>|])", r"\\\1", cost(op))]
    parts += ["## Bits", bits(name)]
    rows = measured(name)
    if rows:
        parts += ["## Measured", rows]
    return "\n\n".join(parts) + "\n"


def reference_formula(op: Op) -> str:
    """The formula in the docstring of the reference: what stands before its arguments."""
    text = re.sub(r"\n +", "\n", op.reference.__doc__ or "")
    return re.split(r"\n\n?(?:Args:|Arguments |Returns:)", text)[0].strip()


def cost(op: Op) -> str:
    """What the head of the C++ kernel says of passes, bytes, parallelism and accuracy."""
    path = ROOT / "csrc" / "cpu" / family(op) / f"{op.name}.cpp"
    for shared in ("info_nce" if op.name == "nt_xent" else op.name, op.name):
        path = path if path.exists() else path.with_name(f"{shared}.cpp")
    if not path.exists():
        return "That of the operations that it is made of."
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("//"):
            break
        lines.append(line.removeprefix("//").strip())
    return "\n".join(lines)


def bits(name: str) -> str:
    """What the tests hold of the operation's results, to the bit."""
    text = "The same inputs give the same bits in every run with the same number of threads."
    if name in SAME_BITS:
        text += (
            " A row has the same bits alone, in any batch, beside any padding, and on any number of"
            " threads of a CPU (of `linear_cross_entropy`: the losses with `reduction='none'`)."
        )
    if name == "mlm_mask":
        text = "Results are bit-identical on every backend, in any batch, on any process."
    return text


def measured(name: str) -> str:
    """The rows of benchmarks/results for this operation: medians of PyTorch as installed."""
    with RESULTS.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["operation"] == name]
    rows = [r for r in rows if r["pages"] == "installed"]
    if not rows:
        return ""
    lines = ["| shape, dtype, pass | side | ms | time / ours | MiB |", "|---|---|---|---|---|"]
    for r in rows:
        side = "ours" if r["variant"] == "fused" else r["variant"]
        ratio = "" if r["variant"] == "fused" else r["fused_speedup"]
        shape = f"{r['shape']}, {r['dtype']}, {r['pass']}"
        lines.append(f"| {shape} | {side} | {r['ms']} | {ratio} | {r['extra_mib']} |")
    where = dict.fromkeys(
        f"{r['machine']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}, "
        f"{r['date']}"
        for r in rows
    )
    how = "[How the numbers were measured](../measuring.md)."
    return "\n".join(lines) + f"\n\n{'; '.join(where)}. {how}"
