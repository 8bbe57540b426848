"""Tells what a run would do, for `--dry-run`: counts, lengths, the first rows as tokens, memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..scoring.model_access import hidden_width, layers_name, without_wrapper
from .job import Job

ROWS = 2  # that are shown
BATCHES = 200  # whose lengths are measured
COUNTS, PLAIN = "\033[32m", "\033[0m"
ADAMW = 8  # bytes a parameter: two averages in float32
ACTIVATIONS = 34  # bytes a token, layer and hidden unit (Korthikanti et al. 2022, without scores)
MIB = 2**20
NOT_READ = ("word_ids", "token_type_ids")  # beside the ids of tokens


class Sequences(NamedTuple):
    """Rows of a batch that a model reads.

    Attributes:
        name: what they are.
        ids: `(B, S)`.
        real: `(B, S)`, True at real tokens.
        counted: `(B, S)`, True at tokens of which a loss is formed.
    """

    name: str
    ids: Tensor
    real: Tensor
    counted: Tensor


def preview(job: Job, steps: int, tokenizer: Any) -> str:
    """Returns the text of a dry run."""
    batch = job.batches[0]
    parts = [_counts(job, steps), _lengths(job)]
    if tokenizer is not None:
        parts.append(_rows(job, batch, tokenizer))
    parts.append(_memory(job, batch))
    return "\n\n".join(part for part in parts if part)


def _counts(job: Job, steps: int) -> str:
    counts = {name.replace("_", " "): value for name, value in job.counts.items()}
    batches = job.batches
    trained = sum(p.numel() for m in job.trainer.modules() for p in m.parameters())
    moved = sum(p.numel() for m in job.trainer.modules() for p in m.parameters() if p.requires_grad)
    lines = {
        **counts,
        "rows a step": batches.batch_size,
        "steps an epoch": batches.per_epoch,
        "steps": steps,
        "parameters": f"{trained:,}, of which {moved:,} are trained",
    }
    return "\n".join(f"{name:24} {value}" for name, value in lines.items())


def _lengths(job: Job) -> str:
    """Returns the lengths of the rows of an epoch, or of its first batches."""
    lengths: dict[str, list[int]] = {}
    steps = min(job.batches.per_epoch, BATCHES)
    for step in range(steps):
        for part in sequences(job, job.batches[step], counted=False):
            lengths.setdefault(part.name, []).extend(part.real.sum(1).tolist())
    if not lengths:
        return ""
    head = f"{'tokens':24} {'rows':>8} {'least':>7} {'median':>7} {'95 %':>7} {'most':>7}"
    lines = [head]
    for name, values in lengths.items():
        values = sorted(values)
        high = values[min(len(values) - 1, int(0.95 * len(values)))]
        lines.append(
            f"{name:24} {len(values):8} {values[0]:7} {statistics.median(values):7.0f} "
            f"{high:7} {values[-1]:7}"
        )
    if steps < job.batches.per_epoch:
        lines.append(f"(of the first {steps} of {job.batches.per_epoch} batches)")
    return "\n".join(lines)


def _rows(job: Job, batch: Mapping[str, Any], tokenizer: Any) -> str:
    colour = sys.stdout.isatty()
    begin, end = (COUNTS, PLAIN) if colour else ("[", "]")
    said = "in green" if colour else "in brackets"
    lines = [f"the first rows; tokens of which a loss is formed stand {said}:"]
    for part in sequences(job, batch):
        for row in range(min(ROWS, len(part.ids))):
            tokens = tokenizer.convert_ids_to_tokens(part.ids[row].tolist())
            shown = [
                f"{begin}{token}{end}" if counted else str(token)
                for token, real, counted in zip(tokens, part.real[row], part.counted[row])
                if real
            ]
            lines.append(f"  {part.name}: {' '.join(shown)}")
    return "\n".join(lines)


def sequences(job: Job, batch: Mapping[str, Any], counted: bool = True) -> list[Sequences]:
    """Returns the sequences of tokens in the arguments of a training step.

    Args:
        job: of the batch.
        batch: arguments of a training step.
        counted: False: which tokens count need not be known.
    """
    found = []
    for name, ids in batch.items():
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            continue
        if name in NOT_READ or not (name == "prompts" or "ids" in name):
            continue
        mask = batch.get(_mask_of(name))
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        of_loss = _counted(job, batch, name, ids, real) if counted else real
        found.append(Sequences(name.removesuffix("_ids"), ids, real, of_loss))
    return found


def _mask_of(name: str) -> str:
    if name == "prompts":
        return "prompt_masks"
    if name.startswith("input_ids"):
        return name.replace("input_ids", "attention_mask")
    return name.replace("_ids", "_mask")


def _counted(job: Job, batch: Mapping[str, Any], name: str, ids: Tensor, real: Tensor) -> Tensor:
    if name == "prompts":
        return torch.zeros_like(real)
    side = name.removesuffix("_ids")
    if f"{side}_response_mask" in batch:
        return batch[f"{side}_response_mask"] != 0
    if "prompt_lengths" in batch:
        return real & (real.cumsum(1) > batch["prompt_lengths"].unsqueeze(1))
    if hasattr(job.trainer, "create_mlm_mask"):
        keys = {k: batch[k] for k in ("word_ids", "sample_ids") if k in batch}
        return job.trainer.create_mlm_mask(ids, real, **keys, step=0)[2].cpu()
    return real


def _memory(job: Job, batch: Mapping[str, Any]) -> str:
    """Returns the estimate of memory a process needs, in MiB."""
    modules = job.trainer.modules()
    others = [getattr(job.trainer, "ref_policy_model", None),
              getattr(job.trainer, "encoder_momentum", None)]  # fmt: skip
    seen: set[int] = set()
    sizes = {"parameters": _bytes(modules, seen)}
    trained = [p for m in modules for p in m.parameters() if p.requires_grad]
    sizes["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    masters = sum(4 * p.numel() for p in trained if p.element_size() < 4)
    sizes["AdamW"] = sum(ADAMW * p.numel() for p in trained) + masters
    sizes["frozen copy"] = _bytes([m for m in others if isinstance(m, nn.Module)], seen)
    sizes["activations, about"] = _activations(job, modules[0], batch)
    sizes["together"] = sum(sizes.values())
    lines = [f"{name:24} {size / MIB:10.0f} MiB" for name, size in sizes.items() if size]
    return "memory a process, estimated:\n" + "\n".join(lines)


def _bytes(modules: list[nn.Module], seen: set[int]) -> int:
    total = 0
    for parameter in (p for module in modules for p in module.parameters()):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += parameter.numel() * parameter.element_size()
    return total


def _activations(job: Job, model: nn.Module, batch: Mapping[str, Any]) -> int:
    model = without_wrapper(model)
    model = getattr(model, "base_model", model)
    width, name = hidden_width(model), layers_name(model)
    if width is None or name is None:
        return 0
    layers: Any = model.get_submodule(name)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    kept = len(layers) - trained.index(True) if any(trained) else 0
    found = sequences(job, batch, counted=False)
    tokens = sum(part.ids.numel() for part in found) / job.trainer.gradient_accumulation_steps
    bits = 1 if job.trainer.autocast_dtype or next(model.parameters()).element_size() < 4 else 2
    return round(bits * ACTIVATIONS * tokens * width * kept)
