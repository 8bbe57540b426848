"""The exponential moving average of many tensors, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference

dispatch.define("ema_update_fwd(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()")
dispatch.register("ema_update_", "ema_update_fwd")


class EMAUpdateCall(NamedTuple):
    """The arguments of the kernel."""

    targets: list[Tensor]
    sources: list[Tensor]
    momentum: float


DTYPES = (*checks.FLOATS, *checks.INTEGERS, torch.bool)


@torch.no_grad()
def ema_update_(
    targets: Tensor | Iterable[Tensor],
    sources: Tensor | Iterable[Tensor],
    momentum: float,
    *,
    backend: str | None = None,
) -> None:
    """Sets every target to target + (1 - momentum) * (source - target), in place.

    One pass over all tensors, however many and small: an element of both is read and one written.
    Computed in float32 (float64 for float64 targets) and rounded to the target's dtype once.
    Source: He 2020 (MoCo), eq. 2.

    Args:
        targets: tensors, or one, modified; `model.parameters()` or `model.state_dict().values()`
            will do. Integers and booleans (counters of batches) are copied from their source. The
            pairs take effect one after the other: a tensor that comes twice is updated twice, and
            a source that is an earlier target has its updated values. No two elements of a target
            may share their memory, as those of an expanded tensor do.
        sources: as many tensors of the same shapes, on the devices of their targets and of
            any dtype; no gradient.
        momentum: in [0, 1]; 0 copies to the bit, 1 leaves floating-point targets as they are.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Raises:
        ValueError, TypeError: a wrong argument; no target has been changed then.
    """
    checks.iterable("targets", targets, "tensors, or one")
    checks.iterable("sources", sources, "tensors, or one")
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    sources = [sources] if isinstance(sources, Tensor) else list(sources)
    checks.between("momentum", momentum, 0, 1)
    if len(targets) != len(sources):
        raise ValueError(
            f"sources: expected as many tensors as targets, {len(targets)}, got {len(sources)}"
        )
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _check_pair(i, target, source)
        if not target.is_contiguous():
            checks.no_shared_elements(f"targets[{i}]", target)
    if not targets:
        return
    backend = dispatch.choose("ema_update_", targets[0].device, backend)
    if backend == "reference":
        reference.ema_update_(targets, sources, momentum)
    else:
        call = EMAUpdateCall(targets=targets, sources=sources, momentum=float(momentum))
        dispatch.kernel("ema_update_fwd", backend)(*call)
        if momentum != 1:
            dispatch.written(targets)


def _check_pair(i: int, target: Tensor, source: Tensor) -> None:
    """Cheap where nothing is wrong: there are hundreds of pairs."""
    if isinstance(target, Tensor) and isinstance(source, Tensor):
        known = target.dtype in DTYPES and source.dtype in DTYPES
        dense = checks.is_dense(target) and checks.is_dense(source)
        if known and dense and target.shape == source.shape and target.device == source.device:
            return
    checks.tensor(f"targets[{i}]", target, DTYPES)
    checks.tensor(f"sources[{i}]", source, DTYPES)
    checks.shape(f"sources[{i}]", source, target.shape, "that of its target")
    checks.same_device(f"sources[{i}]", source, f"targets[{i}]", target)


@dispatch.fake("ema_update_fwd")
def _(*fields):
    return None
