"""The demo's comparison of the loss head and of a DPO step, fused and in plain PyTorch."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_kernels import empty_cache, linear_token_logprobs
from apt_model.rl import DPOTrainer, create_dpo_trainer
from apt_model.rl.pair_batch import PairBatch, make_pair_batch

MIB = 2.0**20
AGREEMENT = 1e-3  # of the two losses, relative: both are float32
PRINTED = (("time (ms)", "milliseconds"), ("peak memory (MiB)", "peak_mib"))


class PeakMemory:
    """The most memory that a call needs beyond what is in use, in MiB; NaN where unknown.

    On a GPU what PyTorch allocates there; on Linux the high-water mark of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def of(self, call: Callable[[], Any]) -> float:
        """Calls `call()` and returns its peak."""
        gc.collect()
        empty_cache()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            call()
            return (torch.cuda.max_memory_allocated(self._device) - before) / MIB
        if not _forget_high_water_mark():
            call()
            return float("nan")
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before) / MIB


def _forget_high_water_mark() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as in use
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def peak_of_process() -> float:
    """Returns the most memory the process ever had, in MiB; NaN where unknown."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(
    fused: Callable[[], Any], eager: Callable[[], Any], device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Returns medians of time and peak memory of both, taken in turn round by round."""
    taken: dict[str, list[tuple[float, float]]] = {"fused": [], "eager": []}
    peak = PeakMemory(device)
    for index in range(rounds + 1):
        for name, call in (("fused", fused), ("eager", eager)):
            timed = _Timed(call, device)
            memory = peak.of(timed)
            if index:  # the first round warms up
                taken[name].append((1000 * timed.seconds, memory))
    return {
        name: {
            "milliseconds": statistics.median(time for time, _ in values),
            "peak_mib": statistics.median(memory for _, memory in values),
        }
        for name, values in taken.items()
    }


class _Timed:
    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call, self._device, self.seconds = call, device, 0.0

    def __call__(self) -> None:
        self._wait()
        start = time.perf_counter()
        self._call()
        self._wait()
        self.seconds = time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def compare_heads(
    model: nn.Module, batch: Mapping[str, Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    """Compares hidden states to log-probabilities, forward and backward, on a real batch."""
    device = model.lm_head.weight.device
    pairs = make_pair_batch(**batch, device=device)
    ids, attention_mask, counted = pairs.sequences()
    with torch.no_grad():
        hidden = model.base_model(ids, attention_mask=attention_mask, use_cache=False)[0]
    hidden = hidden[:, :-1].contiguous().requires_grad_()
    weight, targets, mask = model.lm_head.weight, ids[:, 1:], counted[:, 1:].contiguous()

    def fused() -> Tensor:
        hidden.grad = None
        logps = linear_token_logprobs(hidden, weight, targets, mask=mask).sum()
        logps.backward()
        return logps.detach()

    def eager() -> Tensor:
        hidden.grad = None
        logps = _eager_logps(F.linear(hidden, weight), targets, mask).sum()
        logps.backward()
        return logps.detach()

    torch.testing.assert_close(fused(), eager(), rtol=AGREEMENT, atol=0)
    return compare(fused, eager, device, rounds)


def _eager_logps(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    costs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -(costs.view_as(targets) * mask)


def compare_steps(
    model: nn.Module, batch: Mapping[str, Tensor], beta: float, rounds: int
) -> dict[str, dict[str, float]]:
    """Compares whole training steps at the learning rate 0, which leave the model as it is.

    The fused step is `DPOTrainer.train_step`; the eager one is what one writes in plain PyTorch:
    logits of policy and reference, a whole pass of each, AdamW.
    """
    trainer = create_dpo_trainer(model, beta=beta, learning_rate=0.0)
    eager = EagerStep(trainer, batch)
    with torch.no_grad():
        ours = trainer.compute_dpo_loss(**batch)[0]
        torch.testing.assert_close(ours.float(), eager.loss(), rtol=AGREEMENT, atol=0)
    trainer.train_step(**batch)  # the first steps try what can be shared with the reference
    return compare(lambda: trainer.train_step(**batch), eager, trainer.device, rounds)


class EagerStep:
    """A DPO step in plain PyTorch, on the models of a trainer."""

    def __init__(self, trainer: DPOTrainer, batch: Mapping[str, Tensor]) -> None:
        self._policy, self._reference = trainer.policy_model, trainer.ref_policy_model
        self._beta = trainer.config.beta
        self._trained = [p for p in self._policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=0.0, weight_decay=0.0, fused=True)
        self._pairs: PairBatch = make_pair_batch(**batch, device=trainer.device)

    def _answers(self, model: nn.Module) -> Tensor:
        ids, attention_mask, counted = self._pairs.sequences()
        logits = model(ids, attention_mask=attention_mask, use_cache=False).logits
        logps = _eager_logps(logits[:, :-1], ids[:, 1:], counted[:, 1:])
        return logps.sum(-1).unflatten(0, (2, -1))

    def loss(self) -> Tensor:
        """Returns the loss of Rafailov et al. 2023, equation 7."""
        with torch.no_grad():
            reference = self._answers(self._reference)
        chosen, rejected = self._answers(self._policy) - reference
        return F.softplus(-self._beta * (chosen - rejected)).mean()

    def __call__(self) -> float:
        """Makes the step and reads the loss, as training loops do."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        return loss.item()


def table_of(comparisons: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the comparisons as lines of text."""
    lines = [f"{'':<12}{'':<20}{'fused':>10}{'eager':>10}{'eager/fused':>14}"]
    for part, sides in comparisons.items():
        for title, key in PRINTED:
            fused, eager = sides["fused"][key], sides["eager"][key]
            ratio = eager / fused if fused else float("nan")
            lines.append(f"{part:<12}{title:<20}{fused:>10.0f}{eager:>10.0f}{ratio:>13.2f}x")
            part = ""
    return "\n".join(lines)
