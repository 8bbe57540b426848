"""The options that every trainer shares: how they are read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..scoring.model_access import FSDPModule

AUTOCAST_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
FUSED_OPTIMIZER_DEVICES = ("cpu", "cuda", "xpu")


def device_of(module: nn.Module) -> torch.device:
    """Returns where the first parameter (or buffer) of `module` is; the CPU where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switches `module` to evaluation mode, and afterwards each of its parts back to its own."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def move_modules(modules: Iterable[nn.Module], device: torch.device | str | None) -> torch.device:
    """Moves the modules, and returns where they are: `device`, or where the first one was."""
    modules = list(modules)
    if device is None:
        return device_of(modules[0])
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for module in modules:
        if device_of(module) != device:
            module.to(device)
    return device


def read_autocast_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that a name or a torch.dtype means; None: no autocast."""
    known = AUTOCAST_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if known not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast_dtype must be bf16, fp16 or None, got {dtype!r}")
    return known


def read_max_grad_norm(norm: float | None) -> float | None:
    """Returns the largest norm of a gradient; None: any."""
    if norm is not None and not 0 < norm < float("inf"):
        raise ValueError(f"max_grad_norm must be a finite number > 0, or None, got {norm!r}")
    return norm


def read_optimizer(
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """Returns the optimizer, checked, or an AdamW over all parameters that require a gradient."""
    parameters = (p for module in modules.values() for p in module.parameters())
    trained = {id(p): p for p in parameters if p.requires_grad}
    if not trained:
        raise ValueError(f"no parameter of the {' and '.join(modules)} requires a gradient")
    if optimizer is None:
        fused = all(p.device.type in FUSED_OPTIMIZER_DEVICES for p in trained.values())
        return torch.optim.AdamW(
            list(trained.values()), lr=learning_rate, weight_decay=weight_decay, fused=fused
        )
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"the optimizer holds no parameter of the {' and '.join(modules)} that requires a "
            "gradient: make it after the model was wrapped"
        )
    return optimizer


def read_scheduler(optimizer: Optimizer, scheduler: Any) -> Any:
    """Returns a torch scheduler of `optimizer`, made from a factory where one is given."""
    known = (LRScheduler, ReduceLROnPlateau)
    if scheduler is None:
        return None
    if not isinstance(scheduler, known):
        if not callable(scheduler):
            raise TypeError(f"scheduler must be a torch scheduler or make one, got {scheduler!r}")
        scheduler = scheduler(optimizer)
    if not isinstance(scheduler, known) or scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must be a torch scheduler of the trainer's own optimizer")
    return scheduler


def read_log(log: Any) -> Callable[[dict[str, float]], Any]:
    """Returns a function of a step's record, from a callable, a TensorBoard writer or None."""
    if log is None:
        return lambda record: None
    if hasattr(log, "add_scalar"):

        def write(record: dict[str, float]) -> None:
            for name, value in record.items():
                if name != "step":
                    log.add_scalar(name, value, record["step"])

        return write
    if not callable(log):
        raise TypeError(f"log must be callable or a TensorBoard writer, got {type(log).__name__}")
    return log


def data_parallel_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns the process groups over which the first wrapped module averages gradients."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            return [module.process_group]
        if isinstance(module, FSDPModule):
            mesh = next(p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh"))
            return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return []
