"""OPS: what tests, benchmarks and the README need to know of every operation.

No operation imports this. Every module here with an `OP` is an entry; it alone gives the operation
accuracy tests of output and every gradient on every backend, rejection tests, one-graph tests, an
`opcheck` of every operator call, a benchmark row and a README row.
"""

from __future__ import annotations

import importlib
import pkgutil

from .entry import Benchmark, Op, Rejected, Sample

_MODULES = (
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(__path__, prefix=f"{__name__}.")
)
OPS: dict[str, Op] = {
    op.name: op
    for op in sorted(
        (module.OP for module in _MODULES if hasattr(module, "OP")), key=lambda op: op.name
    )
}

__all__ = ["OPS", "Benchmark", "Op", "Rejected", "Sample"]
