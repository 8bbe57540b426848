"""The base of every trainer: one update from micro-batches, its checks, its state, its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..scoring.devices import move_modules
from ..scoring.model_access import FSDPModule
from .curves import Curves, read_numbers
from .master_weights import FIRST_SCALE, FIRST_SCALE_OF_FLOAT16, MasterWeights
from .options import (
    data_parallel_groups,
    read_autocast_dtype,
    read_log,
    read_max_grad_norm,
    read_optimizer,
    read_scheduler,
)
from .state import (
    load_module_state,
    load_optimizer_state,
    module_state,
    random_state,
    set_random_state,
    snapshot,
)

STATE = ("modules", "optimizer", "scheduler", "scaler", "random_state", "total_steps", "statistics")


class TrainingLoop:
    """One optimizer step from one or several micro-batches; the trainers derive from it.

    An update reads the device once: the loss, every metric and the gradient norm in one tensor,
    before the optimizer steps, so that a loss or a gradient that is not finite raises
    `FloatingPointError` while every parameter still is what it was.

    Args:
        modules: what is trained, by name. One may be DDP- or FSDP2-wrapped.
        optimizer: None: AdamW over all parameters that require a gradient. Of 16-bit parameters
            it comes to hold float32 copies (`MasterWeights`).
        learning_rate: of that AdamW.
        weight_decay: weight decay of that AdamW.
        decay_norms_and_biases: whether weight decay moves norms and biases too.
        device: where the modules are moved and the batches too; None: where the modules are.
        gradient_accumulation_steps: into how many micro-batches a training step cuts its batch.
        autocast_dtype: "bf16", "fp16" (with a loss scaler), such a torch.dtype, or None.
        scheduler: a torch scheduler of `optimizer`, or a callable that makes one from it.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        log: called with every step's record, or a TensorBoard writer.
    """

    monitored: Sequence[str] = ("loss",)  # the curves to draw
    statistics: ClassVar[Mapping[str, str]] = {}  # of get_statistics(): which metric each is

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizer: Optimizer | None,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        decay_norms_and_biases: bool = False,
        device: torch.device | str | None = None,
        gradient_accumulation_steps: int = 1,
        autocast_dtype: torch.dtype | str | None = None,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        max_grad_norm: float | None = None,
        log: Callable[[dict[str, float]], Any] | Any = None,
    ) -> None:
        steps = gradient_accumulation_steps
        if type(steps) is not int or steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be an int >= 1, got {steps!r}")
        self._modules = dict(modules)
        self.device = move_modules(self._modules.values(), device)
        self.gradient_accumulation_steps = steps
        self.autocast_dtype = read_autocast_dtype(autocast_dtype)
        self.max_grad_norm = read_max_grad_norm(max_grad_norm)
        self.optimizer = read_optimizer(
            self._modules, optimizer, learning_rate, weight_decay, decay_norms_and_biases
        )
        self._masters = MasterWeights(self.optimizer)
        self.scheduler = read_scheduler(self.optimizer, scheduler)
        self._scaler = torch.amp.GradScaler(
            self.device.type,
            FIRST_SCALE_OF_FLOAT16 if self._masters.has_float16 else FIRST_SCALE,
            enabled=self.autocast_dtype is torch.float16 or self._masters.has_float16,
        )
        self._log = read_log(log)
        self._data_parallel_groups = data_parallel_groups(self._modules.values())
        self._processes = math.prod(map(dist.get_world_size, self._data_parallel_groups))
        self.total_steps = 0
        self.is_mid_step = False  # parameters may have changed, the step is not counted
        self.curves = Curves()
        self.with_state: dict[str, Any] = {"curves": self.curves}  # more that a state holds
        if self._masters:
            self.with_state["master_weights"] = self._masters
        self._statistics = dict.fromkeys(self.statistics, 0.0)
        self._grad_norm, self._overflowed = 0.0, False

    def modules(self) -> list[nn.Module]:
        """Returns the modules that are trained."""
        return list(self._modules.values())

    def update(
        self,
        micro_batches: Sequence[Any],
        share: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
        finish: bool = True,
    ) -> dict[str, float]:
        """Makes one optimizer step and returns its loss and metrics as Python numbers.

        Args:
            micro_batches: what `share` is called with, one after the other.
            share: returns the micro-batch's share of the loss and of each metric: divided by the
                counts of the whole update (`count_over_processes`), so that the shares add up.
            finish: False: a training step of several updates; `finish_step` comes after the last.

        Raises:
            FloatingPointError: the loss, a metric or a gradient is not finite; nothing was changed.
        """
        self._zero_grad()
        totals: dict[str, Tensor] = {}
        try:
            for index, micro_batch in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with self._gradients_synchronized(is_last or bool(self._masters)):
                    with self.autocast():
                        loss, metrics = share(micro_batch)
                    # DDP and FSDP average over processes: the shares are of a sum
                    self._scaler.scale(loss * self._processes).backward()
                self._masters.take_gradients()
                for name, value in {"loss": loss, **metrics}.items():
                    totals[name] = totals.get(name, 0) + value.detach()
            numbers = self._step(totals)
        except BaseException:
            self._zero_grad()
            raise
        if finish:
            self.finish_step(numbers)
        return numbers

    def _step(self, totals: dict[str, Tensor]) -> dict[str, float]:
        self._scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        totals["grad_norm"] = (
            whole / self._processes
        )  # the norm is of all processes, other metrics are shares
        metrics = read_numbers(totals, self._data_parallel_groups)
        grad_norm = metrics.pop("grad_norm")
        overflowed = self._scaler.is_enabled() and not math.isfinite(grad_norm)
        finite = math.isfinite(grad_norm) or overflowed
        if not finite or not all(map(math.isfinite, metrics.values())):
            self._scaler.update()  # else it would refuse to unscale the next step's gradients
            raise FloatingPointError(
                f"step {self.total_steps + 1} has the gradient norm {grad_norm} and "
                f"{', '.join(f'{k} {v}' for k, v in metrics.items())}; no parameter was changed"
            )
        self.is_mid_step = True
        self._scaler.step(self.optimizer)  # not when it overflowed: then the scale becomes smaller
        self._scaler.update()
        self._masters.write_back()
        self._grad_norm, self._overflowed = grad_norm, overflowed
        return metrics

    def _train_mode(self) -> None:
        """Brings all modules into training mode."""
        for module in self._modules.values():
            if not module.training:
                module.train()

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Counts a training step: scheduler, record, statistics; of the last update's gradient."""
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics["loss"])
        elif self.scheduler is not None and not self._overflowed:
            self.scheduler.step()
        self.total_steps += 1
        record = {"step": self.total_steps, **metrics}
        record.update(grad_norm=self._grad_norm, learning_rate=learning_rate)
        self.curves.append(record)
        self._statistics |= {k: metrics[v] for k, v in self.statistics.items() if v in metrics}
        self.is_mid_step = False
        self._log(record)

    def count_over_processes(self, count: Any) -> Any:
        """Returns the sum of `count` over the data-parallel processes, on the device (no read)."""
        if not self._data_parallel_groups:
            return count
        total = torch.zeros((), dtype=torch.float64, device=self.device) + count
        for group in self._data_parallel_groups:
            dist.all_reduce(total, group=group)
        return total.float()

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which models and losses run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    @contextmanager
    def _gradients_synchronized(self, wanted: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._modules.values():
                if isinstance(module, DistributedDataParallel) and not wanted:
                    stack.enter_context(module.no_sync())
                elif isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(wanted)
            yield

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for module in self._modules.values():
            module.zero_grad(set_to_none=True)

    def get_statistics(self) -> dict[str, float]:
        """Returns `total_steps` and the values of the last step, a copy."""
        return {"total_steps": self.total_steps, **self._statistics}

    def plot_curves(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """Draws the curves to monitor (or those in `names`) over the steps as one PNG."""
        self.curves.save_png(path, self.monitored if names is None else names)

    def state_dict(self, include_frozen: bool = True) -> dict[str, Any]:
        """Returns all that a continued run needs, as a snapshot that later steps do not change.

        What can change is copied to the CPU, frozen parameters are shared. `torch.load(…,
        weights_only=True)` reads it.

        Args: include_frozen: False: leave frozen parameters out, for runs that load them anyway.
        """
        return {
            "modules": {k: module_state(m, include_frozen) for k, m in self._modules.items()},
            "optimizer": snapshot(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else snapshot(self.scheduler.state_dict()),
            "scaler": self._scaler.state_dict(),
            "random_state": random_state(self.device),
            "total_steps": self.total_steps,
            "statistics": dict(self._statistics),
            **{name: part.state_dict() for name, part in self.with_state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`: on the CPU bit for bit as if never interrupted.

        Raises:
            ValueError: the state is of another kind of trainer, or of one with other modules or
                without a scheduler: nothing was changed.
        """
        differing = sorted(set(state) ^ {*STATE, *self.with_state})
        if differing:
            raise ValueError(
                f"the state is of another kind of trainer: only one of the two has {differing}"
            )
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise ValueError("the state and this trainer must both have a scheduler, or neither")
        self._check_modules(state["modules"])
        for name, part in self.with_state.items():
            part.load_state_dict(state[name])
        self.load_modules(state["modules"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        set_random_state(state["random_state"], self.device)
        self.total_steps, self.is_mid_step = state["total_steps"], False
        self._statistics = dict(state["statistics"])

    def load_modules(self, state: Mapping[str, Any]) -> None:
        """Loads the part `modules` of a state; frozen parameters may be missing."""
        self._check_modules(state)
        for name, module in self._modules.items():
            load_module_state(module, state[name])

    def _check_modules(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._modules):
            theirs, ours = sorted(state), sorted(self._modules)
            raise ValueError(f"the state holds the modules {theirs}, this trainer has {ours}")
