"""Frozen first layers, computed once for a policy and for the copy that is its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.model_access import layers_name


class SharedPrefix:
    """Hands the output of a policy's frozen first layers to the copy, which then skips its own.

    Of a model of which only the last layers are trained, the reference's forward pass then costs
    those layers only. What is handed over is tested, not assumed: an output that depends on a
    trained parameter is not used, and the first time (in training and in evaluation mode each) the
    copy runs both ways and must say the same; else it goes on computing its own layers.

    Args:
        policy: the layers of the policy, in order.
        copied: the layers of the copy.
    """

    def __init__(self, policy: nn.ModuleList, copied: nn.ModuleList) -> None:
        frozen = 0
        while frozen < len(policy) and _is_frozen(policy[frozen]):
            frozen += 1
        self._last: Any = policy[frozen - 1] if frozen else None
        self._skipped = list(copied[:frozen])
        self._independent = False  # of trained parameters: seen once where gradients were on
        self._trusted: dict[bool, bool] = {}  # by the mode of the policy
        self._outputs: list[Any] = []

    @classmethod
    def of(cls, policy: nn.Module, copied: nn.Module | None) -> SharedPrefix:
        """Returns the prefix of their outermost list of layers; an empty one without a copy."""
        name = layers_name(policy)
        if copied is None or name is None:
            return cls(nn.ModuleList(), nn.ModuleList())
        layers: Any = policy.get_submodule(name)
        copied_layers: Any = copied.get_submodule(name)
        return cls(layers, copied_layers)

    def __bool__(self) -> bool:
        return self._last is not None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context the policy's forward pass is listened to."""
        self._outputs = []
        if not self or not (torch.is_grad_enabled() or self._independent):
            yield
            return
        hook = self._last.register_forward_hook(lambda _m, _a, out: self._outputs.append(out))
        try:
            yield
        finally:
            hook.remove()

    def run(self, score: Callable[[], Tensor]) -> Tensor:
        """Returns `score()` of the copy, its first layers skipped where that can be trusted."""
        outputs, self._outputs = self._outputs, []
        mode = bool(self) and self._last.training
        usable = len(outputs) == 1 and not _depends_on_trained(outputs[0])
        self._independent = usable if outputs else self._independent
        if not usable or self._trusted.get(mode) is False:
            return score()
        if mode in self._trusted:
            return self._skipping(outputs[0], score)
        expected = score()
        logps = self._skipping(_copied(outputs[0]), score)
        self._trusted[mode] = torch.allclose(logps, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        return expected

    def _skipping(self, output: Any, score: Callable[[], Tensor]) -> Tensor:
        for layer in self._skipped:
            layer.forward = lambda *args, **kwargs: output
        try:
            return score()
        finally:
            for layer in self._skipped:
                del layer.forward


def _is_frozen(layer: nn.Module) -> bool:
    return "forward" not in vars(layer) and not any(p.requires_grad for p in layer.parameters())


def _tensors(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _depends_on_trained(output: Any) -> bool:
    return any(not isinstance(t, Tensor) or t.requires_grad for t in _tensors(output))


def _copied(output: Any) -> Any:
    copies = [tensor.clone() for tensor in _tensors(output)]
    return type(output)(copies) if isinstance(output, (tuple, list)) else copies[0]
