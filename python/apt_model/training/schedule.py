"""Learning-rate schedules by name, with a warm-up whose first step already learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

CONSTANT = ("constant", "constant_with_warmup")


def schedule(
    name: str, warmup_steps: int, total_steps: int, options: Mapping[str, float] | None = None
) -> Callable[[Optimizer], LambdaLR] | None:
    """Returns what makes the schedule of an optimizer; None where the rate never changes.

    The rate of step s, counted from 0, is (s + 1) / warmup_steps of the whole one in the warm-up,
    and after it what `transformers.get_scheduler` says of that name.

    Args:
        name: as `transformers.get_scheduler`, of those that depend on the step alone.
        warmup_steps: steps of the warm-up.
        total_steps: steps of the run, warm-up included.
        options: options of that schedule, such as `min_lr_rate`.

    Raises:
        ValueError: there is no such schedule, or it has no such option.
    """
    if name in CONSTANT:
        if options:
            raise ValueError(f"--schedule-options: {name} has none, got {', '.join(options)}")
        return warmup_of(warmup_steps)
    made = partial(
        _scheduled, name=name, warmup=warmup_steps, total=total_steps, options=dict(options or {})
    )
    _try(made, name)
    return made


def _try(made: Callable[[Optimizer], LambdaLR], name: str) -> None:
    import torch
    from transformers import SchedulerType

    parameter = torch.nn.Parameter(torch.zeros(()))
    try:
        made(torch.optim.SGD([parameter], lr=1.0))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        names = ", ".join(sorted(kind.value for kind in SchedulerType))
        raise ValueError(
            f"--schedule {name}: {error}; transformers has {names}, of which those can be used "
            "that depend on the step alone"
        ) from None


def warmup_of(steps: int) -> Callable[[Optimizer], LambdaLR] | None:
    """Returns what makes a rate that rises over `steps` steps and stays; None for no steps."""
    return partial(_warmup, steps=steps) if steps else None


def _warmup(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, partial(_factor, after=lambda step: 1.0, warmup=steps))


def _scheduled(
    optimizer: Optimizer, name: str, warmup: int, total: int, options: Mapping[str, Any]
) -> LambdaLR:
    from transformers import get_scheduler

    rates = [group["lr"] for group in optimizer.param_groups]
    theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=options)
    if not isinstance(theirs, LambdaLR):
        raise ValueError("it follows a measured figure")
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = group["initial_lr"] = rate  # `theirs` has set its own first rate
    factors: list[Callable[[int], float]] = [
        partial(_factor, after=factor, warmup=warmup) for factor in theirs.lr_lambdas
    ]
    return LambdaLR(optimizer, factors)


def _factor(step: int, after: Callable[[int], float], warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else float(after(step))
