"""The options that every trainer shares: how they are read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..scoring.model_access import FSDPModule, has_adapter

AUTOCAST_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
NORM_SUFFIXES = ("Norm", "Norm1d", "Norm2d", "Norm3d")  # of the names of norm layers' classes
FUSED_OPTIMIZER_DEVICES = ("cpu", "cuda", "xpu")


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
    decay_norms_and_biases: bool = False,
) -> Optimizer:
    """Returns the optimizer, checked, or an AdamW over all parameters that require a gradient."""
    parameters = (p for module in modules.values() for p in module.parameters())
    trained = {id(p): p for p in parameters if p.requires_grad}
    if not trained:
        raise ValueError(f"no parameter of the {' and '.join(modules)} requires a gradient")
    for name, module in modules.items():
        _reject_frozen_adapter(name, module)
    if optimizer is None:
        fused = all(p.device.type in FUSED_OPTIMIZER_DEVICES for p in trained.values())
        spared = set() if decay_norms_and_biases or not weight_decay else _spared(modules.values())
        decayed = [p for p in trained.values() if id(p) not in spared]
        others = [p for p in trained.values() if id(p) in spared]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"the optimizer holds no parameter of the {' and '.join(modules)} that requires a "
            "gradient: make it after the model was wrapped"
        )
    return optimizer


def _reject_frozen_adapter(name: str, module: nn.Module) -> None:
    """Raises where an adapter is there to be trained and nothing of it is: a head alone would be.

    So `PeftModel.from_pretrained` gives it by default.
    """
    for part in module.modules():
        if has_adapter(part) and not any(p.requires_grad for p in part.parameters()):
            raise ValueError(
                f"{name}: no parameter of its adapter requires a gradient: load it with "
                "is_trainable=True, or merge it into the model to train something else"
            )


def _spared(modules: Iterable[nn.Module]) -> set[int]:
    """Returns the parameters that weight decay leaves alone, by `id`: norms and biases.

    They are the parameters of norm layers, those named `bias`, and all others of fewer than two
    dimensions (a scale say).
    """
    return {
        id(parameter)
        for module in modules
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dim() < 2 or name == "bias" or type(part).__name__.endswith(NORM_SUFFIXES)
    }


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
