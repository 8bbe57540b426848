"""One benchmark at several sizes of one axis: parts of its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from ..registry import Op, Sample

_HEAD = {"V": ("weight", 0), "D": ("hidden", -1), "N": ("hidden", 0)}
_PAIRS = {"N": ("query", 0), "D": ("query", -1)}
_TOKENS = {"B": ("logps", 0)}
# The argument and the dimension whose size an axis is; equal dimensions of others go with it.
AXES: dict[str, dict[str, tuple[str, int]]] = {
    "token_logprobs": {"N": ("logits", 0), "V": ("logits", -1)},
    "linear_token_logprobs": _HEAD,
    "linear_cross_entropy": _HEAD,
    "linear_policy_loss": {"V": ("weight", 0), "D": ("hidden", -1), "B": ("hidden", 0)},
    "linear_dpo_loss": {"V": ("weight", 0), "D": ("hidden", -1)},
    "dpo_loss": {"B": ("policy_chosen_logps", 0)},
    "bradley_terry_loss": {"B": ("chosen_rewards", 0)},
    "sequence_logps": _TOKENS,
    "kl_penalty": _TOKENS,
    "policy_loss": _TOKENS,
    "value_loss": {"B": ("values", 0)},
    "gae": {"B": ("rewards", 0)},
    "info_nce": _PAIRS,
    "siglip_loss": _PAIRS,
    "nt_xent": {"N": ("z1", 0), "D": ("z1", -1)},
    "sup_con_loss": {"N": ("features", 0), "D": ("features", -1)},
    "mlm_mask": {"B": ("input_ids", 0)},
}
PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
IDS = ("token_ids", "labels")  # they lie in [0, V)


def sizes(op: Op, sample: Sample, axis: str) -> Iterator[tuple[int, Sample]]:
    """Sizes of the axis, from a sixteenth up to the benchmark's own, each with its call."""
    axes = AXES.get(op.name, {})
    if axis not in axes:
        known = ", ".join(sorted(axes)) or "none"
        raise ValueError(f"--scale: expected an axis of {op.name} ({known}), got {axis!r}")
    call = inspect.signature(op.function).bind(*sample.args, **sample.kwargs)
    argument, dimension = axes[axis]
    whole = call.arguments[argument].shape[dimension]
    for size in dict.fromkeys(max(1, round(part * whole)) for part in PARTS):
        yield size, Sample(sample.name, *_part(call, axis, whole, size))


def _part(call: inspect.BoundArguments, axis: str, whole: int, size: int) -> tuple[tuple, dict]:
    changed = {name: _cut(name, x, axis, whole, size) for name, x in call.arguments.items()}
    positional = len(call.args)
    names = list(changed)
    return tuple(changed[n] for n in names[:positional]), {
        n: changed[n] for n in names[positional:]
    }


def _cut(name: str, value, axis: str, whole: int, size: int):
    if not isinstance(value, torch.Tensor):
        return value
    if axis == "V" and name in IDS:
        return torch.where(value >= 0, value % size, value)
    part = value.detach()
    for dimension, length in enumerate(value.shape):
        if length == whole and not (axis == "D" and dimension < value.dim() - 1):
            part = part.narrow(dimension, 0, size)
            if axis != "D":
                break
    return part.contiguous().requires_grad_(value.requires_grad)
