"""The table of what every GPU kernel becomes: registers, shared memory, instructions.

    python tests/gpu/machine_code.py [OPERATION ...]

writes benchmarks/results/machine-code.csv, or the rows of the named operations in it. The launches
are those of the registry: its benchmarks and first samples run as fake tensors, and each operator
call is handed to the Triton launcher of the same name, which is asked what it would start. A change
of a kernel changes the table, and the table is in the repository.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton_offline as offline
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import apt_kernels.triton as kernels
from apt_kernels import dispatch
from apt_kernels.registry import OPS, Sample

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "machine-code.csv"
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SAMPLES = 2  # of the registry's calls, of every operation and dtype
MIX = {  # instructions by kind: NVIDIA's names, AMD's names
    "load_16": (r"LDG\.E(\.\w+)*\.128|LDGSTS\.E.*\.128", r"(global|buffer)_load_dwordx4"),
    "load": (r"LDG|LDGSTS", r"(global|buffer)_load"),
    "store_16": (r"STG\.E(\.\w+)*\.128", r"(global|buffer)_store_dwordx4"),
    "store": (r"STG", r"(global|buffer)_store"),
    "matrix": (r"HMMA|HGMMA|UTC\w*MMA", r"v_mfma"),
    "exp_log": (r"MUFU", r"v_(exp|log|rcp)_f32"),
    "fma": (r"FFMA", r"v_(pk_)?(fma|fmac)_f32"),
    "barrier": (r"BAR", r"s_barrier"),
}
FIELDS = (
    "operation", "kernel", "call", "dtype", "variant", "target", "registers", "spilled", "shared",
    "code", *MIX, "triton",
)  # fmt: skip


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "apt":
            self.seen.append((function._schema.name.removeprefix("apt::"), args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _samples(op, dtype) -> Iterator[tuple[str, Sample]]:
    """The shapes of the benchmarks, and small odd ones. Fake tensors: shapes without numbers."""
    for bench in op.benchmarks:
        if dtype in bench.dtypes or (dtype == torch.bfloat16 and torch.float32 in bench.dtypes):
            yield "benchmark", bench.make(dtype)
    for _, sample in zip(range(SAMPLES), op.samples(dtype), strict=False):
        yield "sample", sample


def calls(op, sample) -> list:
    """(name, arguments) of the operator calls of one sample, forward and backward."""
    with _Calls() as mode:
        outputs = op.function(*sample.args, **sample.kwargs, backend="native")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        # on the CPU some look whether the upstream gradient is 1, after their last kernel
        with contextlib.suppress(DataDependentOutputException):
            torch.autograd.backward(ends, [torch.ones_like(o) for o in ends])
    return mode.seen


def launches(op, dtype) -> list[tuple[str, offline.Launch]]:
    """What the Triton launchers would start, once for every specialisation, and for which call."""
    found = {}
    for kind, sample in _samples(op, dtype):
        for name, arguments, named in calls(op, sample):
            launcher = getattr(kernels, name, None)
            if launcher is None:
                continue
            for launch in offline.launches(launcher, *arguments, **named):
                source = offline.source(launch)
                key = launch.name, repr(source.signature), repr(source.constants)
                found.setdefault((*key, repr(source.attrs)), (kind, launch))
    return list(found.values())


def operations() -> list:
    return [
        op for op in OPS.values() if all((k, "triton") in dispatch._KERNELS for k in op.kernels)
    ]


def rows(target: str, names: tuple[str, ...] = ()) -> Iterator[dict]:
    for op in operations():
        for dtype in DTYPES if not names or op.name in names else ():
            if dtype not in op.dtypes:
                continue
            with offline.as_on(target), FakeTensorMode():
                found = launches(op, dtype)
            variants: dict[tuple[str, str], int] = {}
            for call, launch in found:
                variant = variants[launch.name, call] = variants.get((launch.name, call), 0) + 1
                machine = offline.compiled(launch, target)
                place = 0 if target.startswith("sm_") else 1
                yield {
                    "operation": op.name,
                    "kernel": launch.name.strip("_").removesuffix("_kernel"),
                    "call": call,
                    "dtype": str(dtype).removeprefix("torch."),
                    "variant": str(variant),
                    "target": target,
                    "registers": str(machine.registers),
                    "spilled": str(machine.spills),
                    "shared": str(machine.shared),
                    "code": str(sum(machine.instructions.values())),
                    **{k: str(machine.count(p[place])) for k, p in MIX.items()},
                    "triton": triton.__version__,
                }


def read() -> list[dict]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def main(names: tuple[str, ...]) -> None:
    """Writes the table; of operations that are named, their rows in it."""
    unknown = set(names) - {op.name for op in operations()}
    if unknown:
        sys.exit(f"no such operation: {', '.join(sorted(unknown))}")
    old = read() if names else []
    table = []
    for target in offline.TARGETS:
        for op in operations():
            if names and op.name not in names:
                key = (target, op.name)
                table += [row for row in old if (row["target"], row["operation"]) == key]
                continue
            for row in rows(target, (op.name,)):
                table.append(row)
                if int(row["spilled"]) or int(row["shared"]) > offline.SHARED_LIMIT[target]:
                    print("over the limits:", row, file=sys.stderr)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
