"""Snapshots of modules, optimizers and random states, for checkpoints that continue bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
    module.load_state_dict(dict(state), strict=False)


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
