"""Compiles the launches of Triton kernels for GPUs that are not here; inspects the machine code.

`launches(...)` runs a launcher on CPU tensors and notes every kernel it would start, with the
blocks, warps and specialisations it would start it with; `compiled(launch, target)` compiles just
that. Needs neither a GPU nor a driver, but TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 99 * 1024, "sm_100": 99 * 1024, "gfx942": 64 * 1024}
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def as_on(target: str):
    """The launchers decide as they would on the target: AMD's warps are 64 threads wide."""
    if target.startswith("sm_"):
        yield
        return
    from apt_kernels.triton.common import rows

    with mock.patch.object(torch.version, "hip", "7.0"), mock.patch.object(rows, "WARP_SIZE", 64):
        yield


def bound(kernel: JITFunction, values: tuple, named: dict) -> Launch:
    """kernel[grid](*values, **named)"""
    options = {key: named.pop(key) for key in OPTIONS if key in named}
    arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
    assert set(arguments) == set(kernel.arg_names), f"{kernel.fn.__name__}: {set(arguments)}"
    return Launch(kernel, arguments, options)


def launches(launcher, *arguments, **named_arguments) -> list[Launch]:
    """What `launcher(*arguments)` would start; nothing is run, its results mean nothing."""
    seen = []

    def note(kernel, *values, grid, warmup=False, **named):
        seen.append(bound(kernel, values, named))

    with mock.patch.object(JITFunction, "run", note):
        launcher(*arguments, **named_arguments)
    return seen


def _type_of_item(item: torch.Tensor | float | int | None) -> str:
    if item is None or (isinstance(item, int) and item == 1):
        return "constexpr"
    if isinstance(item, torch.Tensor):
        return "*" + TYPES[item.dtype]
    if isinstance(item, float):
        return "fp32"
    return "i32" if abs(item) < 2**31 else "i64"


def _in_sixteens(value: float | int) -> bool:
    return isinstance(value, int) and value % 16 == 0


def source(launch: Launch, by_address: bool = False) -> ASTSource:
    """The launch as Triton itself would specialise it: for aligned tensors, or by their address."""

    def aligned(tensor):
        return not by_address or tensor.data_ptr() % 16 == 0

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None
        if fixed or (specialised and not isinstance(value, torch.Tensor) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, tuple):  # its items are specialised, whatever the parameter is
            signature[parameter.name] = tuple(_type_of_item(item) for item in value)
            for number, item in enumerate(value):
                if signature[parameter.name][number] == "constexpr":
                    constants[place, number] = item
                elif aligned(item) if isinstance(item, torch.Tensor) else _in_sixteens(item):
                    attributes[place, number] = [["tt.divisibility", 16]]
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible = aligned(value)
        else:
            default = "fp32" if isinstance(value, float) else "i32"
            default = "i64" if default == "i32" and abs(value) >= 2**31 else default
            signature[parameter.name] = parameter.annotation_type or default
            divisible = specialised and _in_sixteens(value)
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the machine code of a kernel uses."""

    registers: int
    spills: int  # bytes of stack a thread
    shared: int
    instructions: Counter

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compiled(launch: Launch, target: str) -> Machine:
    kernel = triton.compile(source(launch), target=TARGETS[target], options=launch.options)
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
        spills = int(numbers["private_segment_fixed_size"])
        names = re.findall(r"^\s+([a-z]+_\w+)", text, re.M)
        return Machine(int(numbers["vgpr_count"]), spills, shared, Counter(names))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    assert numbers and names, "no machine code was read"
    spills = numbers["STACK"] + numbers["LOCAL"]
    return Machine(numbers["REG"], spills, shared, Counter(names))


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr
