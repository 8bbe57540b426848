"""TRL's functions under their own names, and a patch that puts them into TRL's trainers.

The functions below need no TRL. `apply_to_trl()` replaces TRL's in the running process, for its
trainers (tried with TRL 1.16); `remove_from_trl()` puts TRL's own back.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from ..ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..ops.logprobs.token_logprobs import token_logprobs
from ..ops.preference.bradley_terry_loss import bradley_terry_loss

_PATCHED_MODULE = "trl.trainer.utils"
_REWARD_MODULE = "trl.trainer.reward_trainer"
_TRAINERS = ("dpo_trainer", "grpo_trainer", "kto_trainer", "rloo_trainer", "sft_trainer")
_originals: dict[str, Any] = {}  # TRL's own objects by name, while ours are in their place
# TRL's optional results, in its order; all but the first are metrics without a gradient.
_METRICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_calls: dict[str, Any] = {"taken": 0, "refused": {}}


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
    """`linear_token_logprobs` with TRL's arguments, which TRL's fused heads call.

    Only `apply` is there. Under autocast the products are in its dtype, with float32 sums, and the
    logits are not rounded. The metrics of the whole distribution that DPO, KTO and SFT log
    (`log_sum_sq_probs`, `mean_logits`, `is_top1`) have no gradient; they come from a pass of their
    own over chunks of the logits. A call that cannot be served goes to TRL's own function: it is
    counted in `report()` with its reason, and the first of each reason warns.
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
        outputs: tuple[str, ...] = _METRICS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's five results; those that are not asked for are None."""
        refused = _refusal(weight, logit_scale)
        if refused is not None:
            _count_refusal(refused)
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
        _calls["taken"] += 1
        dtype = _product_dtype(hidden)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # A reference is scored without a gradient. It takes the entropy too, as the policy does:
        # the two are then computed alike, and equal models have margins of exactly 0.
        with_entropy = "entropy" in outputs or not torch.is_grad_enabled()
        results: Any = linear_token_logprobs(
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
        entropy = entropy if "entropy" in outputs else None
        asked = [name for name in _METRICS[1:] if name in outputs]
        metrics: dict[str, Tensor] = {}
        if asked:
            logits = _LogitsInChunks(
                hidden.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
                logit_scale / temperature,
                None if final_logit_softcapping is None else final_logit_softcapping / temperature,
                chunk_size,
            )
            metrics = logits.metrics(targets, asked)
        log_sum_sq_probs, mean_logits, is_top1 = (metrics.get(name) for name in _METRICS[1:])
        return logps, entropy, log_sum_sq_probs, mean_logits, is_top1


class _LogitsInChunks:
    """The logits that a head's softmax is of, for rows and columns a chunk at a time."""

    ROWS = 1024

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        columns: int,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale, self.softcap, self.columns = scale, softcap, columns

    def tile(self, rows: slice, first: int) -> Tensor:
        """`(rows, columns)` float32: the logits of the columns from `first` on."""
        chunk = slice(first, first + self.columns)
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = (self.hidden[rows] @ self.weight[chunk].t()).float()
        if self.bias is not None:
            logits += self.bias[chunk].float()
        logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def metrics(self, targets: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Each metric by name, `(N,)`: float32, and bool for is_top1."""
        if names == ["mean_logits"] and self.softcap is None:
            return {"mean_logits": self._mean()}
        parts = [
            self._of_rows(slice(first, first + self.ROWS), targets[first : first + self.ROWS])
            for first in range(0, max(len(targets), 1), self.ROWS)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _mean(self) -> Tensor:
        """The mean logit without a softcap is linear: one product with the mean of the weight."""
        mean = self.hidden.float() @ self.weight.mean(0, dtype=torch.float32)
        if self.bias is not None:
            mean += self.bias.mean(dtype=torch.float32)
        return mean * self.scale

    def _of_rows(self, rows: slice, targets: Tensor) -> dict[str, Tensor]:
        vocabulary = self.weight.shape[0]
        nothing = torch.full(targets.shape, -torch.inf, device=targets.device)
        log_sum, log_sum_sq, largest, largest_before = nothing, nothing, nothing, nothing
        total, target = torch.zeros_like(nothing), torch.zeros_like(nothing)
        for first in range(0, vocabulary, self.columns):
            logits = self.tile(rows, first)
            local = targets - first
            column = torch.arange(logits.shape[1], device=logits.device)
            before = logits.masked_fill(column >= local.unsqueeze(-1), -torch.inf)
            largest_before = torch.maximum(largest_before, before.amax(-1))
            largest = torch.maximum(largest, logits.amax(-1))
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
            log_sum_sq = torch.logaddexp(log_sum_sq, (2 * logits).logsumexp(-1))
            total = total + logits.sum(-1)
            inside = (local >= 0) & (local < logits.shape[1])
            chosen = logits.gather(-1, local.clamp(0, logits.shape[1] - 1).unsqueeze(-1))
            target = torch.where(inside, chosen.squeeze(-1), target)
        return {
            "log_sum_sq_probs": log_sum_sq - 2 * log_sum,
            "mean_logits": total / vocabulary,
            "is_top1": (target >= largest) & (target > largest_before),  # of equals, the first
        }


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _refusal(weight: Tensor, logit_scale: float) -> str | None:
    """Why a call goes to TRL's own function, or None."""
    if hasattr(weight, "ds_id"):
        return "the head is sharded by DeepSpeed ZeRO-3"
    if logit_scale <= 0:
        return f"logit_scale is {logit_scale}, which is not above 0"
    return None


def _count_refusal(reason: str) -> None:
    if reason not in _calls["refused"]:
        warnings.warn(f"apt_kernels: TRL's own head computes this call, as {reason}", stacklevel=3)
    _calls["refused"][reason] = _calls["refused"].get(reason, 0) + 1


def report() -> dict[str, Any]:
    """How often the fused head was called since `apply_to_trl()`.

    Returns:
        `{"taken": calls that were fused, "refused": {reason: calls that went to TRL's function}}`.
    """
    return {"taken": _calls["taken"], "refused": dict(_calls["refused"])}


def _compute_reward_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """`RewardTrainer.compute_loss` with the loss of `bradley_terry_loss`, in float32.

    TRL's own method runs the model and keeps its metrics; its loss of one number a pair is dropped.
    """
    margin = inputs.get("margin")
    original = _originals["RewardTrainer.compute_loss"]
    _, outputs = original(self, model, inputs, True, num_items_in_batch)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    _calls["taken"] += 1
    loss = bradley_terry_loss(
        chosen,
        rejected,
        margin=None if margin is None else margin.to(chosen.dtype),
        center_coef=self.args.center_rewards_coefficient or 0.0,
    )
    return (loss, outputs) if return_outputs else loss


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

    The trainers for DPO, GRPO, KTO, RLOO and SFT then compute their log-probabilities with these
    kernels, and the trainer of reward models its loss, at TRL's defaults too; `report()` counts the
    calls. A second call changes nothing more
    than modules that were imported since. A function of another TRL that takes other arguments
    stays, with a warning.

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
    for name in [n for n, current in found.items() if not _same_arguments(n, current)]:
        warnings.warn(
            f"apt_kernels: {_PATCHED_MODULE}.{name} of this TRL takes other arguments "
            f"{_arguments(found.pop(name))} than {_arguments(_REPLACEMENTS[name])}; it stays",
            stacklevel=2,
        )
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
    _calls.update(taken=0, refused={})
    return _exchange(_pairs()) | _patch_reward_trainer()


def remove_from_trl() -> dict[str, str]:
    """Puts TRL's own functions back.

    Returns:
        What was put back, as `apply_to_trl` reports it; empty where nothing was replaced.

    Raises:
        RuntimeError: another patch was put on top of this one. Nothing is changed then.
    """
    utils = sys.modules.get(_PATCHED_MODULE)
    trainer: Any = getattr(sys.modules.get(_REWARD_MODULE), "RewardTrainer", None)
    for name in _originals:
        if name == "RewardTrainer.compute_loss":
            if trainer.compute_loss is not _compute_reward_loss:
                raise RuntimeError(
                    f"{_REWARD_MODULE}.{name} was replaced once more, by "
                    f"{_full_name(trainer.compute_loss)}: undo that patch first"
                )
        elif vars(utils)[name] is not _REPLACEMENTS[name]:
            raise RuntimeError(
                f"{_PATCHED_MODULE}.{name} was replaced once more, by "
                f"{_full_name(vars(utils)[name])}: undo that patch first"
            )
    report = _exchange({name: (ours, theirs) for name, (theirs, ours) in _pairs().items()})
    if (original := _originals.get("RewardTrainer.compute_loss")) is not None:
        trainer.compute_loss = original
        report[f"{_REWARD_MODULE}.RewardTrainer.compute_loss"] = _full_name(original)
    _originals.clear()
    return report


def _pairs() -> dict[str, tuple[Any, Any]]:
    """Returns TRL's function and ours, by name."""
    return {n: (_originals[n], ours) for n, ours in _REPLACEMENTS.items() if n in _originals}


def _patch_reward_trainer() -> dict[str, str]:
    """Puts the loss of reward models in its place; a method of other arguments stays, and warns."""
    trainer = importlib.import_module(_REWARD_MODULE).RewardTrainer
    current = trainer.compute_loss
    if current is not _compute_reward_loss:
        theirs, ours = _arguments(current), _arguments(_compute_reward_loss)
        if theirs != ours or not _is_trls(current):
            warnings.warn(
                f"apt_kernels: RewardTrainer.compute_loss is {_full_name(current)} "
                f"with arguments {theirs}, not TRL's with {ours}; it stays",
                stacklevel=3,
            )
            return {}
        _originals["RewardTrainer.compute_loss"] = current
        trainer.compute_loss = _compute_reward_loss
    return {f"{_REWARD_MODULE}.RewardTrainer.compute_loss": _full_name(_compute_reward_loss)}


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


def _arguments(value: Any) -> list[str]:
    """The names of a function's parameters, or of the forward pass of an autograd function."""
    function: Any = value
    if isinstance(value, type):
        function = getattr(value, "forward", None) or getattr(value, "apply", None)
    return [name for name in inspect.signature(function).parameters if name != "ctx"]


def _same_arguments(name: str, current: Any) -> bool:
    """Whether ours can stand in the place of TRL's: calls pass arguments by position."""
    if current is _REPLACEMENTS[name] or not _is_trls(current):
        return True  # another patch: refused below
    theirs = _arguments(current)
    return theirs == _arguments(_REPLACEMENTS[name])[: len(theirs)]


def _is_trls(value: Any) -> bool:
    return getattr(value, "__module__", "").split(".")[0] == "trl"


def _full_name(value: Any) -> str:
    module = getattr(value, "__module__", "?")
    return f"{module}.{getattr(value, '__qualname__', type(value).__name__)}"
