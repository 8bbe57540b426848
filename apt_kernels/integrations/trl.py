"""TRL's functions under their own names, and a patch that puts them into TRL's trainers.

The functions below need no TRL. `apply_to_trl()` replaces TRL's in the running process, for its
trainers (tried with TRL 1.16); `remove_from_trl()` puts TRL's own back.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..ops.logprobs.token_logprobs import token_logprobs

_PATCHED_MODULE = "trl.trainer.utils"
_TRAINERS = ("dpo_trainer", "grpo_trainer", "rloo_trainer")
_originals: dict[str, Any] = {}  # TRL's own objects by name, while ours are in their place


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """`token_logprobs`; float32 also for half-precision logits, where TRL rounds the result.

    Args:
        logits: `(..., V)`, differentiable.
        index: `(...)`, or `(..., K)` for K tokens a row.
        temperature: the logits are divided by it.
        row_mask: in the shape of `index`; 0 where the result is 0.

    Returns:
        The log-probabilities in the shape of `index`.
    """
    if row_mask is None or index.dim() < logits.dim():
        return token_logprobs(logits, index, temperature=temperature, mask=row_mask)
    logps = token_logprobs(logits, index, temperature=temperature)
    return logps.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of softmax(logits) in nats, differentiable.

    Args:
        logits: `(..., V)`.
        chunk_size: rows that TRL takes at a time; there are no chunks here.

    Returns:
        `(...)` float32 (float64 for float64 logits).
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logprobs(logits, index, return_entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both from one pass over the logits.

    Args:
        logits: `(..., V)`, differentiable.
        index: `(...)`.
        entropy_requires_grad: False cuts the entropy from the graph.
        temperature: the logits are divided by it.
        row_mask: `(...)`; 0 where both results are 0.

    Returns:
        `(logps, entropy)`, `(...)` each.
    """
    logps, entropy = token_logprobs(
        logits, index, temperature=temperature, mask=row_mask, return_entropy=True
    )
    return logps, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """What TRL's fused heads call: `linear_token_logprobs` with TRL's arguments.

    Only `apply` is there. Calls that ask for more than log-probabilities and entropy (DPO's policy
    wants two metrics of the whole distribution besides), or in mixed precision, or with a head
    sharded by DeepSpeed, go to TRL's own function. In DPO the reference then takes one way and the
    policy the other: where they are equal, margins are rounding (1e-7) instead of exactly 0.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """TRL's five results; the last three are None here."""
        if not _can_take(hidden, weight, bias, logit_scale, outputs):
            return _trl_function()(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        with_entropy = "entropy" in outputs
        results = linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            return_entropy=with_entropy,
        )
        logps, entropy = results if with_entropy else (results, None)
        return logps, entropy, None, None, None


def _can_take(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, outputs: tuple
) -> bool:
    return (
        set(outputs) <= {"log_probs", "entropy"}
        and not torch.is_autocast_enabled(hidden.device.type)
        and hidden.dtype == weight.dtype
        and (bias is None or bias.dtype == weight.dtype)
        and not hasattr(weight, "ds_id")
        and logit_scale > 0
    )


def _trl_function():
    original = _originals.get("_ChunkedLogProbFunction")
    if original is None:  # called by itself, without the patch
        original = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    return original.apply


_REPLACEMENTS: dict[str, Any] = {
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    "_ChunkedLogProbFunction": ChunkedLogProbFunction,
}


def apply_to_trl() -> dict[str, str]:
    """Puts the functions of this module in the place of TRL's, in every module that has them.

    A second call changes nothing more than modules that were imported since.

    Returns:
        What was replaced: `{"trl.trainer.utils.selective_log_softmax": "apt_kernels. ...", ...}`.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: another library's patch is in the place of one of the functions, or this TRL
            has none of them. Nothing is changed then.
    """
    utils = importlib.import_module(_PATCHED_MODULE)
    for trainer in _TRAINERS:
        importlib.import_module(f"trl.trainer.{trainer}")
    found = {name: vars(utils)[name] for name in _REPLACEMENTS if name in vars(utils)}
    if not found:
        raise RuntimeError(f"{_PATCHED_MODULE} has none of {sorted(_REPLACEMENTS)} in this TRL")
    for name, current in found.items():
        if current is not _REPLACEMENTS[name] and not _is_trls(current):
            raise RuntimeError(
                f"{_PATCHED_MODULE}.{name} is already replaced, by {_full_name(current)}: undo "
                "that patch first (two fused patches on top of each other give neither)"
            )
    for name, current in found.items():
        if current is not _REPLACEMENTS[name]:
            _originals[name] = current
    return _exchange({n: (_originals[n], _REPLACEMENTS[n]) for n in _originals})


def remove_from_trl() -> dict[str, str]:
    """Puts TRL's own functions back.

    Returns:
        What was put back, as `apply_to_trl` reports it; empty where nothing was replaced.

    Raises:
        RuntimeError: another patch was put on top of this one. Nothing is changed then.
    """
    utils = sys.modules.get(_PATCHED_MODULE)
    for name in _originals:
        if vars(utils)[name] is not _REPLACEMENTS[name]:
            raise RuntimeError(
                f"{_PATCHED_MODULE}.{name} was replaced once more, by "
                f"{_full_name(vars(utils)[name])}: undo that patch first"
            )
    report = _exchange({n: (_REPLACEMENTS[n], _originals[n]) for n in _originals})
    _originals.clear()
    return report


def _exchange(pairs: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """Puts the new object where a module of TRL has the old one; reports what the modules have."""
    report = {}
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith(("trl.trainer.", "trl.experimental.")):
            continue
        for name, (old, new) in pairs.items():
            current = vars(module).get(name)
            if current is old:
                setattr(module, name, new)
            if current is old or current is new:
                report[f"{module_name}.{name}"] = _full_name(new)
    return report


def _is_trls(value: Any) -> bool:
    return getattr(value, "__module__", "").split(".")[0] == "trl"


def _full_name(value: Any) -> str:
    module = getattr(value, "__module__", "?")
    return f"{module}.{getattr(value, '__qualname__', type(value).__name__)}"
