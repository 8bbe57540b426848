"""What the contrastive losses share: checks, temperatures, reductions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import checks
from ...codes import REDUCTIONS
from ..common.module import LossModule
from .ring.ring import Ring


def check_rows(name: str, rows: Any) -> None:
    checks.tensor(name, rows)
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (N, D), D >= 1, got {tuple(rows.shape)}")


def check_like(name: str, rows: Any, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Rows that can be compared with `other`."""
    check_rows(name, rows)
    if rows.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name}: expected shape (N, {other.shape[1]}), the width of {other_name}, "
            f"got {tuple(rows.shape)}"
        )
    checks.same_device(name, rows, other_name, other)
    if dtype:
        checks.same_dtype(name, rows, other_name, other)


def check_options(
    temperature: Any, reduction: Any, process_group: Any, name: str, like: Any
) -> None:
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature, name, like)
    else:
        checks.positive("temperature", temperature)
    checks.choice("reduction", reduction, REDUCTIONS)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )


def check_label_offset(offset: Any, query: Tensor, key: Tensor, process_group: Any) -> None:
    checks.integer("label_offset", offset)
    count, classes = query.shape[0], key.shape[0]
    if process_group is not None:
        check_one_key_each("process_group", offset, query, key)
    elif offset < 0 or count + offset > classes:
        raise ValueError(
            f"label_offset: expected 0 <= label_offset <= M - N = {classes - count}, got {offset}"
        )


def check_one_key_each(option: str, offset: int, query: Tensor, key: Tensor) -> None:
    if key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key: expected {query.shape[0]} rows with {option}, one a query, "
            f"got shape {tuple(key.shape)}"
        )
    if offset != 0:
        raise ValueError(f"label_offset: expected 0 with {option}, got {offset}")


def check_scalar(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    checks.tensor(name, value)
    checks.shape(name, value, (), "one number for all rows")
    checks.same_device(name, value, other_name, other)


def scalar(value: float | Tensor) -> tuple[Tensor | None, float]:
    """A kernel's pair of arguments: the tensor, which counts, or the number."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, float(value))


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def grad_temperature(temperature: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
    """From d loss / d (1 / temperature) of every row and its upstream gradient."""
    scale = 1 / temperature.to(slopes.dtype)
    return (-scale * scale * (weights * slopes).sum()).to(temperature.dtype)


def results(
    losses: Tensor,
    correct: Tensor,
    *,
    reduction: str,
    ranks: Ring | None,
    return_correct: bool,
    total: int | Tensor | None = None,
    directions: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of this rank, and how many predictions are right where that is asked for.

    Args:
        losses: `(N,)`, of the rows of this rank.
        correct: `(N,)`, the share of a row's predictions that are right.
        reduction: of the losses; "mean" so that the mean over ranks is over all rows.
        ranks: of the process group, or None.
        return_correct: also return the number of right predictions.
        total: what the mean divides by; None: the rows of all ranks.
        directions: predictions of a row.

    Returns:
        The loss, or `(loss, correct)`: correct, a 0-dim int64 tensor, is the number of right
        predictions among the rows of this rank.
    """
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        if total is None:
            total = losses.shape[0] if ranks is None else ranks.total
        total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        loss = loss * (1 if ranks is None else ranks.world) / total
    if not return_correct:
        return loss
    return loss, (correct * directions).sum(dtype=torch.int64)


class SimilarityLoss(LossModule):
    """The base of the modules of contrastive losses: the options that all of them have.

    A temperature that is an `nn.Parameter` is learned.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
        return_correct: bool = False,
        backend: str | None = None,
    ) -> None:
        check_options(temperature, reduction, process_group, "temperature", temperature)
        checks.flag("normalize", normalize)
        checks.flag("return_correct", return_correct)
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            process_group=process_group,
            return_correct=return_correct,
            backend=backend,
        )
