"""Snapshots of modules, optimizers and random states, for checkpoints that continue bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def module_state(module: nn.Module, include_frozen: bool = True) -> dict[str, Any]:
    """Returns the state of a module; frozen parameters are not copied, or left out."""
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    state = module.state_dict(keep_vars=True)
    if not include_frozen:
        state = {name: value for name, value in state.items() if id(value) not in frozen}
    return {k: v.detach() if id(v) in frozen else snapshot(v) for k, v in state.items()}


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads what `module_state` returned; only frozen parameters may be missing."""
    own = module.state_dict(keep_vars=True)
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    missing = [name for name in own if name not in state and id(own[name]) not in frozen]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise ValueError(
            f"the state is of another {type(module).__name__}: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
    module.load_state_dict({k: sharded_as(v, own[k]) for k, v in state.items()}, strict=False)


def whole(value: Any) -> Any:
    """Returns nested tensors with the sharded ones put together, on the CPU; of all processes."""
    if isinstance(value, Tensor):
        return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def sharded_as(value: Any, like: Any) -> Any:
    """Returns a whole tensor sharded as another one is; anything else as it is."""
    if not hasattr(like, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the state of an optimizer; whole tensors are sharded as their parameters are."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, held, strict=False))
    of_parameters = {
        number: {k: sharded_as(v, parameters.get(number)) for k, v in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def snapshot(value: Any) -> Any:
    """Returns a copy of nested tensors, on the CPU (sharded ones where they are)."""
    if isinstance(value, Tensor):
        sharded = hasattr(value, "device_mesh")
        return value.detach().clone() if sharded else value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    return value


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the state of PyTorch's generators of the CPU and of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
