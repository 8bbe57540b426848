"""Float32 copies of parameters of 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .state import sharded_as, snapshot

HALF = (torch.float16, torch.bfloat16)
FIRST_SCALE = 2.0**16  # of a loss, as torch's GradScaler begins
# A gradient of float16 parameters is float16 itself: 2^16 would overflow in the first steps
FIRST_SCALE_OF_FLOAT16 = 2.0**10


class MasterWeights:
    """Float32 copies of an optimizer's 16-bit parameters, which the optimizer holds in their place.

    An update smaller than half a unit in the last place of a 16-bit parameter would leave it as it
    was, and an Adam state of 16 bits forgets small squares. So the optimizer moves the copies, its
    state is float32, and the parameters follow them, rounded. Parameters of 32 bits and more stay
    in the optimizer themselves. The order of the groups and of their parameters does not change,
    so schedulers and options of groups work on. Source: Micikevicius et al. 2018.

    A step is: backward, `take_gradients()`, unscaling and clipping of what the optimizer holds, the
    optimizer's step, `write_back()`.

    Args:
        optimizer: changed in place; state that it has already goes to the copies.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.dtype not in HALF:
                    continue
                master = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                group["params"][index] = master
                self._pairs.append((parameter, master))
                if parameter in optimizer.state:
                    optimizer.state[master] = _float_state(optimizer.state.pop(parameter))
        self._versions = [_version(parameter) for parameter, _ in self._pairs]
        self._masters = {id(parameter): master for parameter, master in self._pairs}

    def __bool__(self) -> bool:
        return bool(self._pairs)

    @property
    def has_float16(self) -> bool:
        """Whether a trained parameter is float16, whose gradients need a loss scaler."""
        return any(p.dtype is torch.float16 and p.requires_grad for p, _ in self._pairs)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns what the optimizer holds for a parameter: its copy, or itself."""
        return self._masters.get(id(parameter), parameter)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Adds the parameters' gradients to their copies' in float32 and removes them."""
        self._follow_changes()
        for parameter, master in self._pairs:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the copies into the parameters."""
        if self._pairs:
            local = [(_local(parameter), _local(master)) for parameter, master in self._pairs]
            parameters, masters = map(list, zip(*local, strict=True))
            torch._foreach_copy_(parameters, masters)
            self._versions = [_version(parameter) for parameter, _ in self._pairs]

    @torch.no_grad()
    def _follow_changes(self) -> None:
        """Takes over parameters that something else has changed since, a loaded state say."""
        for index, (parameter, master) in enumerate(self._pairs):
            if (version := _version(parameter)) != self._versions[index]:
                same = master.to(parameter.dtype) == parameter
                master.copy_(torch.where(same, master, parameter.float()))
                self._versions[index] = version

    def state_dict(self) -> dict[str, Any]:
        """Returns the copies of trained parameters, by their number."""
        return snapshot(self._trained())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state_dict()`.

        Raises:
            ValueError: the state is of other parameters.
        """
        own = self._trained()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise ValueError(
                f"the state holds {len(state)} float32 copies of 16-bit parameters, which are not "
                f"the {len(own)} of this trainer"
            )
        for name, master in own.items():
            master.copy_(sharded_as(state[name], master))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {str(i): master for i, (_, master) in enumerate(self._pairs) if master.requires_grad}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _version(tensor: Tensor) -> int:
    return _local(tensor)._version


def _float_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
        for name, value in state.items()
    }
