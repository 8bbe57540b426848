"""Where modules are, and the mode they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
