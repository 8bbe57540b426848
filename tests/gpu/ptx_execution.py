"""Runs kernels as they are compiled: the PTX of Triton's compiler and of nvcc, on the CPU.

The PTX is executed by `ptxrun`, a module of the folder that APT_GPU_ON_CPU names. It is told the
memory of a launch: an access outside of it or not aligned, a race in shared memory or between
blocks, and a barrier that not all threads reach are errors. It counts what warps ask of memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
import triton_offline as offline
from triton.runtime.jit import JITFunction

from gpu import cuda_emulation
from gpu.cuda_emulation.build import (
    HERE,
    ROOT,
    cache_directory,
    cuda_sources,
    digest,
    included,
)

sys.path.insert(0, str(Path(os.environ["APT_GPU_ON_CPU"]).resolve()))
import ptxrun

TARGET = "sm_80"  # the matrix instructions of later ones cannot be executed
SECTOR = 32  # bytes


@dataclass
class Traffic:
    """What the loads, or the stores, asked of global memory."""

    requests: int = 0  # of warps
    bytes: int = 0  # what all lanes of a warp load is its sector
    sectors: int = 0  # those that two requests touch counted twice


def memory(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    """The bytes that the tensors span, those that overlap as one piece."""
    spans = sorted((t.data_ptr(), t.data_ptr() + offline.extent(t)) for t in tensors if t.numel())
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and start < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    pieces = [(ctypes.c_uint8 * (end - start)).from_address(start) for start, end in joined]
    return [np.ctypeslib.as_array(piece) for piece in pieces]


class Kernel(ptxrun.Kernel):
    """What ptxrun lacks: addresses of parameters, and races of blocks within one instruction."""

    def _run(self, blocks, most_steps):
        known = set(self.base.tolist())
        parameters = [(raw.__array_interface__["data"][0], raw) for raw in self.pbytes.values()]
        self.bufs += [(start, raw.nbytes, raw) for start, raw in parameters if start not in known]
        self.bufs.sort(key=lambda buffer: buffer[0])
        self.base = np.array([start for start, *_ in self.bufs], np.uint64)
        self.end = np.array([start + size for start, size, _ in self.bufs], np.uint64)
        super()._run(blocks, most_steps)

    def val(self, operand, kind):
        if operand in self.pbytes:
            start = self.pbytes[operand].__array_interface__["data"][0]
            return np.full(self.N, start, np.uint64)
        return super().val(operand, kind)

    def addr(self, operand):
        """Addresses in registers of 32 bits wrap around."""
        address = super().addr(operand)
        register = re.match(r"\[\s*([%\w$@]+)", operand)[1]
        narrow = register in self.R and self.R[register].itemsize == 4
        return address & np.uint64(0xFFFFFFFF) if narrow else address

    def op_bfind(self, op, operands, lanes):
        if "shiftamt" not in op:
            return super().op_bfind(op, operands, lanes)
        highest = [int(x).bit_length() - 1 for x in self.val(operands[1], "u32")]
        shift = [31 - bit if bit >= 0 else -1 for bit in highest]
        self.put(operands[0], np.array(shift, np.int32), lanes)

    def op_blockred(self, op, operands, lanes):
        """bar.red.or of a block, whose threads have just left a barrier together."""
        holds = self.val(operands[1], "pred") & lanes
        some = np.zeros(int(self.cta.max()) + 1, bool)
        some[self.cta[holds]] = True
        self.put(operands[0], some[self.cta], lanes)

    def op_ld(self, op, operands, lanes):
        address = re.match(r"\[\s*([%\w$@]+)", operands[1])
        if self.space(op) != "param" or address[1] not in self.R:
            return super().op_ld(op, operands, lanes)
        counts, self.prof = self.prof, None  # parameters are no traffic
        super().op_ld(["global" if word == "param" else word for word in op], operands, lanes)
        self.prof = counts

    def grace(self, buffer, offset, size, lanes, writes, atomic):
        # blocks run in lockstep: ptxrun knows who wrote before, not who writes at the same time
        if writes and not atomic:
            order = np.argsort(offset, kind="stable")
            place, block = offset[order], self.ctaglob[lanes][order]
            if ((place[1:] == place[:-1]) & (block[1:] != block[:-1])).any():
                raise ptxrun.PTXError(f"global race: two blocks write the same {size} bytes")
        super().grace(buffer, offset, size, lanes, writes, atomic)


def kernel(ptx: str, name: str | None = None) -> Kernel:
    barrier = r"bar\.red\.or\.pred\s+([^,]+),\s*(\d+),"
    ptx = re.sub(barrier, r"bar.sync \2; blockred.or.pred \1,", ptx)
    return Kernel(ptxrun.Module(ptx), name)


class _Counting:
    """Counts the traffic of launches, by kernel, while asked to."""

    def __init__(self):
        self.counting = False
        self.launches: Counter[str] = Counter()
        self.loads, self.stores = Traffic(), Traffic()

    def start_counting(self) -> None:
        self.counting = True
        self.loads, self.stores = Traffic(), Traffic()

    def stop_counting(self) -> tuple[Traffic, Traffic]:
        self.counting = False
        return self.loads, self.stores

    def _execute(self, name, executable, grid, block, arguments, shared, buffers) -> None:
        self.launches[name] += 1
        executable.launch(
            grid, block, arguments, dyn_shared=shared, buffers=buffers, prof=self.counting
        )
        if not self.counting:
            return
        for instruction, counts in executable.prof.items():
            if counts["space"] != "global":
                continue
            traffic = self.stores if re.search(r"\bst\.", instruction) else self.loads
            traffic.requests += counts["warps"]
            traffic.bytes += min(counts["bytes"], SECTOR * counts["tx"])
            traffic.sectors += counts["tx"]


class Triton(_Counting):
    """Within the context, launches of Triton kernels are compiled and executed."""

    def __init__(self):
        super().__init__()
        self._kernels: dict = {}

    def __enter__(self):
        def run(kernel, *values, grid, warmup=False, **named):
            self._run(offline.bound(kernel, values, named), grid)

        self._patch = mock.patch.object(JITFunction, "run", run)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()

    def _run(self, launch: offline.Launch, grid) -> None:
        source = offline.source(launch, by_address=True)
        key = launch.kernel, *map(repr, (source.signature, source.constants, source.attrs))
        key = *key, repr(launch.options)
        if key not in self._kernels:
            options = launch.options
            code = triton.compile(source, target=offline.TARGETS[TARGET], options=options)
            block = (32 * code.metadata.num_warps,)
            self._kernels[key] = kernel(code.asm["ptx"]), block, code.metadata.shared
        executable, block, shared = self._kernels[key]
        tensors, arguments = [], []
        for name, kinds in source.signature.items():
            value = launch.arguments[name]
            if not isinstance(kinds, tuple):
                kinds, value = (kinds,), (value,)
            for kind, item in zip(kinds, value, strict=True):
                if kind == "constexpr":
                    continue
                if isinstance(item, torch.Tensor):
                    tensors.append(item)
                    item = item.data_ptr()
                arguments.append(item)
        self._execute(launch.name, executable, grid, block, arguments, shared, memory(tensors))


_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)


class Cuda(_Counting, cuda_emulation.Emulation):
    """csrc/cuda by nvcc: its host code as it is, its kernels executed instead of launched."""

    def __init__(self, patches: tuple[tuple[str, str, str], ...] = ()):
        super().__init__()
        library, self._ptx = compile_cuda(patches)
        self._kernels: dict = {}
        self._tensors: list[torch.Tensor] = []
        self._error: Exception | None = None
        self._on_launch = _ON_LAUNCH(self._launched)
        self._library = ctypes.CDLL(str(library))
        self._library.pair_loss_workspace.restype = ctypes.c_int64
        self._library.set_on_launch(self._on_launch)

    def _call(self, name: str, *arguments) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        finally:
            self._tensors.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if status != 0:
            raise RuntimeError(f"{name}: arguments that the launcher refuses")

    def _launched(self, name, sizes, arguments, shared) -> int:
        try:
            if name not in self._kernels:
                (text,) = (text for text in self._ptx if f".entry {name.decode()}(" in text)
                self._kernels[name] = kernel(text, name.decode())
            executable = self._kernels[name]
            values = [
                int.from_bytes(ctypes.string_at(arguments[i], size), "little")
                for i, (_, size) in enumerate(executable.params)
            ]
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            buffers = memory(self._tensors)
            self._execute(name.decode(), executable, grid, block, values, shared, buffers)
        except Exception as error:
            self._error = error
            return 1
        return 0

    def noting(self):
        """A context in which the tensors that are passed on are known to the executor."""
        plain = cuda_emulation._pointer

        def pointer(tensor):
            if tensor is not None:
                self._tensors.append(tensor)
            return plain(tensor)

        return mock.patch.object(cuda_emulation, "_pointer", pointer)


@functools.cache
def compile_cuda(patches: tuple[tuple[str, str, str], ...] = ()) -> tuple[Path, list[str]]:
    """The library of the host code, without the CUDA runtime, and the PTX of every source."""
    sources = cuda_sources()
    for name, old, new in patches:
        assert sources[name].count(old) == 1, f"{name} has changed: seed the bug anew"
        sources[name] = sources[name].replace(old, new)
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    kernels = {name: text for name, text in sources.items() if name.endswith(".cu")}
    kernels["ptx_runtime.cpp"] = (Path(__file__).parent / "ptx_runtime.cpp").read_text()
    kernels["launchers.cpp"] = (HERE / "launchers.cpp").read_text()
    objects = [_object(name, text, included(text, headers)) for name, text in kernels.items()]
    library = cache_directory() / f"ptx-{digest(*(o.name for o in objects))}.so"
    if not library.exists():
        _nvcc(library, "-shared", "-cudart", "none", *objects)
    ptx = [o.with_suffix(".ptx") for o in objects]
    return library, [file.read_text() for file in ptx if file.exists()]


def _object(name: str, text: str, headers: dict[str, str]) -> Path:
    """The object file of a source, with the PTX of its kernels beside it."""
    ours = sorted((ROOT / "csrc" / "include" / "apt").iterdir())
    key = digest(text, *headers.values(), *(p.read_text() for p in ours))
    target = cache_directory() / f"ptx-{Path(name).stem}-{key}.o"
    # Names of internal kernels differ from one compilation to the next: object and PTX must be of
    # the same one, so one process compiles and the object appears last.
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target, name, text, headers)
    return target


def _compile(target: Path, name: str, text: str, headers: dict[str, str]) -> None:
    number = TARGET.removeprefix("sm_")
    code = "-gencode", f"arch=compute_{number},code=compute_{number}"
    with tempfile.TemporaryDirectory() as folder:
        for file, content in {name: text, **headers}.items():
            (Path(folder) / file).write_text(content)
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}", "-Xcompiler", "-fPIC"]
        keep = "--keep", "--keep-dir", folder
        compiled = Path(folder) / "compiled.o"
        _nvcc(compiled, *flags, *code, *keep, "-c", Path(folder) / name)
        for ptx in Path(folder).glob("*.ptx"):
            target.with_suffix(".ptx").write_text(ptx.read_text())
        partial = target.with_suffix(".partial")
        shutil.copy(compiled, partial)
        os.replace(partial, target)


def _nvcc(target: Path, *arguments) -> None:
    """Compiles to a file of this process, then renames: another process never sees half a file."""
    partial = target.with_name(f"{os.getpid()}-{target.name}")
    command = ["nvcc", *map(str, arguments), "-o", str(partial)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}{run.stderr}"
    os.replace(partial, target)
