"""The processes of one data-parallel run, as `torchrun` starts them; one process without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..scoring.model_access import layers_name

Result = TypeVar("Result")


def begin(device: str | None, timeout: float) -> torch.device:
    """Joins the processes that torchrun started; returns the device of this one.

    Args:
        device: its kind, or one device; None: a GPU if there is one.
        timeout: seconds after which waiting for another process is an error.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "RANK" not in os.environ:
        return torch.device(kind)
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return torch.device(kind)


def end() -> None:
    """Leaves the group of processes, when all of them are done."""
    if count() > 1:
        dist.barrier()
        dist.destroy_process_group()


def count() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Returns whether this process writes the files and the messages."""
    return rank() == 0


def share(rows: Sequence[Any], least: int = 1) -> list[Any]:
    """Returns the part of a batch's rows that is this process's, of nearly as many rows each.

    Where some process would have fewer than `least` rows, each has all of them: the mean over all
    processes is the same.
    """
    if len(rows) < least * count():
        return list(rows)
    bounds = [part * len(rows) // count() for part in (rank(), rank() + 1)]
    return list(rows[slice(*bounds)])


def agree(flag: bool) -> bool:
    """Returns whether any process says so; all of them must call this."""
    if count() == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def on_main(call: Callable[[], Result]) -> Result:
    """Calls `call` in the main process and returns its result in all of them.

    What it raises there is raised in all of them.
    """
    if count() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].of_main = True
        raise outcome[1]
    return outcome[0]


def of_all(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of their numbers."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wrapped(model: nn.Module, device: torch.device | str, sharded: bool = False) -> nn.Module:
    """Returns a model whose gradients are averaged over the processes; of one process as it is.

    Args:
        model: a model that is alike in all processes.
        device: where it is moved.
        sharded: FSDP2: its parameters, gradients and the optimizer's state are shared out.
    """
    if count() == 1:
        return model
    model.to(device)
    if not sharded:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (count(),))
    name = layers_name(model)
    layers: Any = () if name is None else model.get_submodule(name)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the modules of the main process hold whole parameters, on the CPU.

    All processes must enter it: each gives its part of what is sharded.
    """
    sharded: list[tuple[nn.Module, str, Any]] = []
    whole: dict[int, nn.Parameter] = {}
    parameter: Any
    for part in (part for module in modules for part in module.modules()):
        for name, parameter in part._parameters.items():
            if not hasattr(parameter, "full_tensor"):
                continue
            sharded.append((part, name, parameter))
            if id(parameter) not in whole:
                full = parameter.detach().full_tensor()
                whole[id(parameter)] = nn.Parameter(full.cpu(), False) if is_main() else parameter
    for part, name, parameter in sharded:
        part._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for part, name, parameter in sharded:
            part._parameters[name] = parameter
