"""A value of each token, of what goes into the layer that makes a model's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .devices import device_of, evaluating
from .model_access import FSDPModule, base_model, logits_of


class ValueHead(nn.Module):
    """A linear value of the hidden states that go into a model's output layer; 0 at first.

    Args:
        model: a causal language model. Its output layer is what `get_output_embeddings()` returns,
            else the linear layer whose output is the logits (one small forward pass tells);
            without such a layer the value is of the logits themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        source, width = _output_layer(model)
        self._source = [source]  # not a submodule: its parameters are the model's
        weight = next(p for p in model.parameters() if p.is_floating_point())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.linear = nn.Linear(width, 1, device=device_of(model), dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def source(self) -> nn.Module | None:
        """The layer whose input is valued; None: the logits are."""
        return self._source[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the values `(B, S, 1)` of hidden states `(B, S, H)`."""
        values = self.linear(hidden.to(self.linear.weight.dtype))  # no view: FSDP2 hooks none
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def wrapped_as(self, model: nn.Module) -> nn.Module:
        """Returns the head wrapped for data parallelism as `model` is."""
        if isinstance(model, DistributedDataParallel):
            return DistributedDataParallel(self, process_group=model.process_group)
        if isinstance(model, FSDPModule):
            from torch.distributed.fsdp import fully_shard

            mesh = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
            fully_shard(self, mesh=mesh)
        return self


@torch.no_grad()
def _output_layer(model: nn.Module) -> tuple[nn.Module | None, int]:
    """Returns the layer that makes the logits, if one does, and the width of what is valued."""
    inner = base_model(model)
    getter = getattr(inner, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    if layer is not None and hasattr(layer, "in_features"):
        return layer, layer.in_features
    outputs: dict[Any, Any] = {}
    hooks = [
        part.register_forward_hook(lambda part, _, output: outputs.update({part: output}))
        for part in inner.modules()
        if isinstance(part, nn.Linear)
    ]
    try:
        with evaluating(model):
            ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
            logits = logits_of(model(ids, attention_mask=None))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, output in outputs.items():
        if output.shape == logits.shape and torch.equal(output, logits):
            return layer, layer.in_features
    return None, logits.shape[-1]
