"""Tell the machine, PyTorch, the build, and the backend that every operation uses."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from .. import __version__, dispatch
from .comparison import machine
from .tables import aligned

OWN_PRODUCTS = "apt_kernels' own products"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(options: argparse.Namespace) -> int:
    found = facts()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


def facts() -> dict[str, Any]:
    """All facts by name; `operations` maps an operation to the backends of each device."""
    told = dispatch.backends()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "apt_kernels": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": machine("cpu"),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "native": told["native"],
        "cuda": told["cuda"],
        "triton": told["triton"],
        "instruction_set": instruction_set(),
        "products": products(),
        "operations": told["operations"],
    }


def instruction_set() -> str:
    """The instruction set of the C++ kernels, and why it is that one."""
    if dispatch._extension is None:
        return "none: the C++ kernels are absent"
    name, asked = dispatch._extension.instruction_set(), os.environ.get("APT_KERNELS_ISA")
    if asked is None:
        return f"{name}: the widest that the processor has and the kernels are compiled for"
    if asked == name:
        return f"{name}: asked for by APT_KERNELS_ISA"
    return f"{name}: APT_KERNELS_ISA asks for {asked!r}"


def products() -> dict[str, str]:
    """Who multiplies matrices inside of the operations over heads and similarities, by dtype."""
    if dispatch._extension is None:
        return {"float32": "PyTorch", "bfloat16": "PyTorch"}
    bfloat16 = dispatch._extension.bfloat16_products()
    return {"float32": OWN_PRODUCTS, "bfloat16": f"{OWN_PRODUCTS}, {bfloat16}"}


def as_text(found: dict[str, Any]) -> str:
    """The facts in lines, and one row for each operation and device."""
    cuda = found["torch_cuda"]
    lines = aligned(
        [
            ("apt_kernels", found["apt_kernels"]),
            ("Python", found["python"]),
            ("system", found["system"]),
            ("processor", f"{found['processor']}, {found['threads']} threads"),
            ("GPUs", ", ".join(found["gpus"]) or "none"),
            ("PyTorch", f"{found['torch']}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"),
            ("C++ kernels", found["native"]),
            ("CUDA kernels", found["cuda"]),
            ("Triton kernels", found["triton"]),
            ("instruction set", found["instruction_set"]),
            *((f"products, {dtype}", who) for dtype, who in found["products"].items()),
        ]
    )
    devices = ["cpu", "cuda"] if found["gpus"] else ["cpu"]
    rows = [("operation", "device", "backend", "others by name")]
    for operation, available in found["operations"].items():
        for device in devices:
            first, *others = available[device]
            rows.append((operation, device, first, ", ".join(others) or "-"))
    return "\n".join([*lines, "", *aligned(rows)])
