"""A training loop whose trainer makes modules of its own: heads beside a user's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..scoring.devices import device_of, evaluating, move_modules
from ..scoring.model_access import FSDPModule
from ..training.loop import TrainingLoop
from ..training.options import data_parallel_groups


class CreatedModulesLoop(TrainingLoop):
    """The loop of one user's model and of modules that the trainer made for it.

    They are brought to the model's device and dtype and join the first group of a given optimizer.
    Of a DDP-wrapped model they start alike in all processes and their gradients are averaged; of an
    FSDP2-wrapped one they are sharded over the same mesh.

    Args:
        name: of the model among the modules.
        model: the user's.
        created: the trainer's modules, by name; None: there is none.
        optimizer: None: AdamW over all parameters that require a gradient.
        device: None: where the model is.
        **options: of `TrainingLoop`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        created: Mapping[str, nn.Module | None],
        optimizer: Optimizer | None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        move_modules([model], device)
        modules = {name: module for name, module in created.items() if module is not None}
        known = {id(p) for p in model.parameters()}
        for module in modules.values():
            bring_beside(model, module)
        self._created = [
            p for module in modules.values() for p in module.parameters() if id(p) not in known
        ]
        sharded = isinstance(model, FSDPModule)
        self._averaged = [p for p in self._created if p.requires_grad and not sharded]
        if optimizer is not None:
            add_parameters(optimizer, self._created)
        super().__init__({name: model, **modules}, optimizer, device=device, **options)

    def _evaluating(self) -> AbstractContextManager[None]:
        """Returns the context in which all modules are in evaluation mode."""
        return evaluating(nn.ModuleList(self._modules.values()))

    def _step(self, totals: dict[str, Tensor]) -> dict[str, float]:
        for parameter in self._averaged if self._data_parallel_groups else ():
            held = self._masters.held(parameter)
            if held.grad is None:  # collectives need all processes
                held.grad = torch.zeros_like(held)
            for group in self._data_parallel_groups:
                dist.all_reduce(held.grad, group=group)
            held.grad /= self._processes
        return super()._step(totals)

    def most_over_processes(self, count: int) -> int:
        """Returns the largest `count` of the data-parallel processes; waits for the device."""
        largest = torch.tensor(count, device=self.device)
        for group in self._data_parallel_groups:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return int(largest)

    def _process_index(self) -> int:
        """Returns the number of this process among those that share the batch."""
        index = 0
        for group in self._data_parallel_groups:
            index = index * dist.get_world_size(group) + dist.get_rank(group)
        return index

    def _process_group(self) -> dist.ProcessGroup | None:
        """Returns the group of all processes whose batches are one; None for this one alone."""
        groups = self._data_parallel_groups
        if len(groups) > 1 and self._processes != dist.get_world_size():
            raise ValueError("over a mesh of several dimensions the negatives are of all processes")
        return groups[0] if len(groups) == 1 else dist.group.WORLD if groups else None


def add_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Adds those parameters that the optimizer does not hold yet to its first group.

    A scheduler may know the groups: one more would have no rate in it.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in parameters if id(p) not in held and p.requires_grad]
    optimizer.param_groups[0]["params"].extend(new)


def bring_beside(model: nn.Module, module: nn.Module) -> None:
    """Brings a module to a model's device and dtype, alike in all processes, sharded as it is.

    What a tied module shares with the model stays itself.
    """
    known = {id(p) for p in model.parameters()}
    own = [p for p in module.parameters() if id(p) not in known]
    if not own:
        return
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    module.to(device_of(model), next(dtypes, torch.get_default_dtype()))
    sharded = isinstance(model, FSDPModule)
    if sharded and len(own) < len(list(module.parameters())):
        raise ValueError(
            "a head that shares parameters with an FSDP2-sharded model cannot be trained: give a "
            "head of its own, or none"
        )
    groups = data_parallel_groups([model])
    if groups:
        own = [p for p in module.parameters() if id(p) not in known]
        _broadcast([*own, *module.buffers()], groups)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
        fully_shard(module, mesh=mesh)


@torch.no_grad()
def _broadcast(tensors: Sequence[Tensor], groups: Sequence[Any]) -> None:
    for tensor in tensors:
        for group in groups:
            dist.broadcast(tensor.detach(), group=group, group_src=0)
