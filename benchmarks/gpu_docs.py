"""The tables of docs/gpu.md: the seeded bugs of the tests, and a roofline.

python benchmarks/gpu_docs.py        rewrites them
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apt_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
# Memory in bytes a second, dense bfloat16 products with float32 sums in flops a second: the
# vendors' data sheets.
GPUS = {
    "H100 SXM": (3.35e12, 989e12),
    "A100 80 GB": (2.04e12, 312e12),
    "RTX 4090": (1.008e12, 165e12),
}
LAUNCH = 3e-6  # seconds; shapes that take less are a matter of launches
# What their authors publish for the same shape: (operation, shape, pass) -> words.
PUBLISHED = {
    ("token_logprobs", "8192 x 151936", "forward"): "TRL's hub kernel, H100: 0.89 ms",
    ("token_logprobs", "8192 x 128256", "forward+backward"): "QuACK, H100: 2.27 ms",
    ("linear_token_logprobs", "8192 x 4096 x 131072", "forward+backward"): (
        "Liger, H100: 50.4 ms; verl in PyTorch: 129 ms"
    ),
    ("gae", "8192 x 1024", "forward"): "rl-triton, H100: 0.045 ms",
    ("info_nce", "symmetric 65536 x 65536, D = 512", "forward+backward"): (
        "memeff, A100: 201 ms; eager: 640 ms"
    ),
}
COLLECT = """
import importlib, json, sys
bugs = []
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    bugs += [[name, what, stem] for what, stem, *_ in module.SEEDED]
json.dump(bugs, sys.stdout)
"""


def triton_bugs() -> list[tuple[str, str, str]]:
    """(test module, what was done, file), of the modules that run under the interpreter."""
    folder = ROOT / "tests" / "gpu"
    names = [p.stem for p in sorted(folder.glob("triton_*_tests.py")) if "SEEDED" in p.read_text()]
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-c", COLLECT, *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [tuple(bug) for bug in json.loads(run.stdout)]


def cuda_bugs() -> list:
    sys.path[:0] = [str(ROOT / "tests")]
    from gpu.test_cuda_seeded_bugs import BUGS

    return list(BUGS)


def bugs_table() -> str:
    names = {
        "values": "values against float64",
        "rules": "the emulator's rules",
        "address": "AddressSanitizer, UBSan",
        "thread": "ThreadSanitizer",
    }
    lines = ["| the kernel … | in | caught by |", "|---|---|---|"]
    for bug in cuda_bugs():
        seen = "; ".join(names[by] for by in bug.by)
        (path,) = (ROOT / "csrc" / "cuda").glob(f"*/{bug.file}")
        lines.append(f"| {bug.name.replace('_', ' ')} | `{path.relative_to(ROOT)}` | {seen} |")
    for module, what, stem in triton_bugs():
        seen = f"values, bounds or races in `{module}.py`"
        lines.append(f"| {what} | `apt_kernels/triton/{stem}.py` | {seen} |")
    return "\n".join(lines)


def _seconds(moved: int, flops: int, bandwidth: float, products: float) -> float:
    return max(moved / bandwidth, flops / products)


def _milliseconds(moved: int, flops: int) -> list[str]:
    cells = []
    for bandwidth, products in GPUS.values():
        time = 1e3 * _seconds(moved, flops, bandwidth, products)
        bound = "memory" if moved / bandwidth > flops / products else "products"
        cells.append(f"{time:.3g} ({bound})")
    return cells


def estimates_table() -> str:
    """The larger of bytes / bandwidth and flops / throughput, at the shapes of the benchmarks."""
    lines = [
        "**Estimate from counted traffic and products, not measured.** The larger of the bytes"
        "\nover the memory's bandwidth and the products over the matrix units' throughput (bfloat16"
        "\nwhere it is taken), milliseconds. No kernel reaches it; a good one comes near."
        "\nShapes below 3 microseconds on the H100 are left out: launches decide there.\n",
        f"| operation | shape | dtype | pass | {' | '.join(GPUS)} | others |",
        "|---|---|---|---|" + "---|" * (len(GPUS) + 1),
    ]
    with FakeTensorMode():
        for op in OPS.values():
            for bench in op.benchmarks:
                if bench.bytes_moved is None or "cuda" not in bench.devices:
                    continue
                dtype = torch.bfloat16 if torch.float32 in bench.dtypes else bench.dtypes[0]
                sample = bench.make(dtype)
                moved = bench.bytes_moved(sample)
                flops = bench.flops(sample) if bench.flops else 0
                passes = {"forward": (moved, flops)}
                if bench.backward:
                    more = bench.backward_bytes_moved, bench.backward_flops
                    moved, flops = (
                        a + (f(sample) if f else 0)
                        for a, f in zip((moved, flops), more, strict=True)
                    )
                    passes["forward+backward"] = (moved, flops)
                for name, counts in passes.items():
                    if _seconds(*counts, *GPUS["H100 SXM"]) < LAUNCH:
                        continue
                    published = PUBLISHED.get((op.name, bench.name, name), "–")
                    cells = (f"`{op.name}`", bench.name, str(dtype).removeprefix("torch."), name)
                    cells += (*_milliseconds(*counts), published)
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets_table() -> str:
    """The shapes of benchmarks/gpu/quick and what they are held against."""
    sys.path[:0] = [str(ROOT / "benchmarks" / "gpu")]
    import targets

    parts = ("forward", "backward", "forward+backward")
    lines = [f"| operation | shape | {' | '.join(parts)} |", "|---" * 5 + "|"]
    for operation, shapes in targets.ROWS.items():
        for shape in shapes:
            goals = (targets.TARGETS.get((operation, shape, part), ()) for part in parts)
            cells = (" or ".join(f"{goal:g}" for goal in of_pass) or "–" for of_pass in goals)
            lines.append(f"| `{operation}` | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    text = PAGE.read_text()
    tables = {"bugs": bugs_table(), "estimates": estimates_table(), "targets": targets_table()}
    for name, table in tables.items():
        start = f"<!-- {name}: written by benchmarks/gpu_docs.py -->\n"
        end = f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{table}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
