"""The table of what every GPU kernel becomes: registers, shared memory, instructions.

    python tests/gpu/machine_code.py [OPERATION ...]

writes benchmarks/results/machine-code.csv, or the rows of the named operations in it, and beside it
machine-code-triton-X.csv for each older Triton (side_by_side.py), which runs this file in a process
of its own. The launches are those of the registry: its benchmarks and first samples run as fake
tensors, and each operator call is handed to the Triton launcher of the same name, which is asked
what it would start. An older Triton compiles the first of every operation's launches of a kernel.
A change of a kernel changes the tables, and the tables are in the repository.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import side_by_side
import torch
import triton
import triton_offline as offline
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import apt_kernels.triton as kernels
from apt_kernels import dispatch
from apt_kernels.registry import OPS, Sample

TABLE = side_by_side.ROOT / "benchmarks" / "results" / "machine-code.csv"
NVIDIA = tuple(target for target in offline.TARGETS if target.startswith("sm_"))
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


def rows(
    target: str, names: tuple[str, ...] = (), dtypes=DTYPES, once: bool = False
) -> Iterator[dict]:
    """once: the first launch of every kernel alone."""
    for op in operations():
        for dtype in dtypes if not names or op.name in names else ():
            if dtype not in op.dtypes:
                continue
            with offline.as_on(target), FakeTensorMode():
                found = launches(op, dtype)
            if once:
                first = {launch.name: (call, launch) for call, launch in reversed(found)}
                found = list(first.values())
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


def table_of(version: str) -> Path:
    """The file of an older Triton."""
    return TABLE.with_name(f"{TABLE.stem}-triton-{version}.csv")


def read(table: Path = TABLE) -> list[dict]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def with_older(version: str, target: str, names: tuple[str, ...] = ()) -> list[dict]:
    """The rows of an older Triton: every operation's kernels once, in bfloat16 where there is it.

    Raises:
        AssertionError: a kernel does not compile.
    """
    run = side_by_side.python(version, __file__, "--rows", target, *names)
    assert run.returncode == 0, f"Triton {version}, {target}: {run.stderr[-3000:]}"
    return [json.loads(line) for line in run.stdout.splitlines()]


def _print_rows(target: str, *names: str) -> None:
    for op in operations():
        if names and op.name not in names:
            continue
        dtype = next((d for d in (torch.bfloat16, torch.int64) if d in op.dtypes), op.dtypes[0])
        for row in rows(target, (op.name,), (dtype,), once=True):
            print(json.dumps(row), flush=True)


def _renewed(table: Path, targets: tuple[str, ...], names: tuple[str, ...], make) -> None:
    """Writes a table; of operations that are named, their rows in it."""
    old = read(table) if names else []
    found = []
    for target in targets:
        new = make(target)
        for op in operations():
            source = new if not names or op.name in names else old
            key = (target, op.name)
            found += [row for row in source if (row["target"], row["operation"]) == key]
    for row in found:
        if int(row["spilled"]) or int(row["shared"]) > offline.SHARED_LIMIT[row["target"]]:
            print("over the limits:", row, file=sys.stderr)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    print(f"wrote {table}", flush=True)


def main(names: tuple[str, ...]) -> None:
    unknown = set(names) - {op.name for op in operations()}
    if unknown:
        sys.exit(f"no such operation: {', '.join(sorted(unknown))}")
    _renewed(TABLE, tuple(offline.TARGETS), names, lambda target: list(rows(target, names)))
    for version in side_by_side.TRITONS:
        _renewed(table_of(version), NVIDIA, names, lambda t, v=version: with_older(v, t, names))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        _print_rows(*sys.argv[2:])
    else:
        main(tuple(sys.argv[1:]))
