"""Facts about a user's model that a trainer needs: its wrappers, its adapters, its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a PyTorch built without torch.distributed
    FSDPModule = ()  # type: ignore[assignment,misc]  # nothing is an instance


def without_wrapper(model: nn.Module) -> Any:
    """Returns the module inside DistributedDataParallel and torch.compile, else `model`."""
    inner: Any = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def has_adapter(model: nn.Module) -> bool:
    """Returns whether `model` is a PEFT model, whose adapter can be disabled."""
    model = without_wrapper(model)
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_model(model: nn.Module) -> Any:
    """Returns the user's model inside all wrappers and adapters."""
    inner = without_wrapper(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """Returns the embedding of the tokens of `model`, None where it cannot be told."""
    getter = getattr(base_model(model), "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Returns how many rows the input embedding of `model` has, None where it cannot be told."""
    embedding = input_embedding(model)
    return None if embedding is None else embedding.num_embeddings


def hidden_width(model: nn.Module) -> int | None:
    """Returns the width of the last hidden states that the configuration of `model` says."""
    config = getattr(model, "config", None)
    for name in ("word_embed_proj_dim", "hidden_size"):  # OPT projects its last hidden states
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    return None


def logits_of(output: Any) -> Tensor:
    """Returns the logits in what a model returned: a tensor, `.logits` or `["logits"]`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "a policy must return logits of shape (B, S, V), bare or as `.logits`, "
            f"got {type(output).__name__}"
        )
    return logits


def layers_name(model: nn.Module) -> str | None:
    """Returns the name of the outermost `nn.ModuleList` (of several the longest), or None."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return min(lists, key=lambda name: (name.count("."), -len(lists[name])), default=None)


def train_last_layers(model: nn.Module, count: int) -> int:
    """Freezes all but the last `count` layers and what follows them; returns what is trained.

    The layers are the outermost `nn.ModuleList`; what follows are the modules that its parent has
    registered after it (the final norm). The output embedding stays frozen.
    """
    name = layers_name(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    layers: Any = model.get_submodule(name)
    if not 0 < count <= len(layers):
        raise ValueError(f"the model has {len(layers)} layers, cannot train the last {count}")
    siblings = list(model.get_submodule(name.rpartition(".")[0]).children())
    model.requires_grad_(False)
    for module in [*layers[-count:], *siblings[siblings.index(layers) + 1 :]]:
        module.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Returns the tensors as autocast gives them to a linear layer: not wider than its dtype."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrowed = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in narrowed else t for t in tensors]
