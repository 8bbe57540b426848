"""open_clip's losses under their own names. Nothing of open_clip is imported."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..ops.contrastive.info_nce import info_nce
from ..ops.contrastive.siglip_loss import siglip_loss


class ClipLoss(nn.Module):
    """`info_nce`, symmetric, of rows that have unit length already.

    Args:
        local_loss: True with several processes: a process returns the loss of its own rows.
        gather_with_grad: True with several processes: gradients, averaged over the processes, are
            those of one process.
        cache_labels: no labels are made here; without effect.
        rank: of this process in the default group.
        world_size: the number of processes.
        use_horovod: False.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(f"use_horovod: expected False, got {use_horovod!r}")
        for name, value in (("local_loss", local_loss), ("gather_with_grad", gather_with_grad)):
            if world_size > 1 and not value:
                raise ValueError(f"{name}: expected True with several processes, got {value!r}")
        self.group = _group(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or a dict of it; logit_scale, differentiable: 1 / temperature."""
        checks.unused("logit_bias", logit_bias, "a softmax cancels it")
        loss = info_nce(
            image_features,
            text_features,
            temperature=_temperature(logit_scale),
            normalize=False,
            symmetric=True,
            process_group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`siglip_loss` of rows that have unit length already.

    Args:
        cache_labels: no labels are made here; without effect.
        rank: of this process in the default group.
        world_size: the number of processes.
        dist_impl: how open_clip exchanges rows, "bidir", "shift", "reduce" or "gather"; the result
            is the same, and so is what is done here.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.group = _group(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or a dict of it; logit_scale and logit_bias are differentiable."""
        loss = siglip_loss(
            image_features,
            text_features,
            temperature=_temperature(logit_scale),
            logit_bias=0.0 if logit_bias is None else _scalar(logit_bias),
            normalize=False,
            process_group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _temperature(logit_scale: float | Tensor) -> float | Tensor:
    """Returns 1 / scale as a Python number would be: in 16 bits it would be off by up to 0.4 %."""
    scale = _scalar(logit_scale)
    return 1 / (scale.double() if isinstance(scale, Tensor) else scale)


def _scalar(value: float | Tensor) -> float | Tensor:
    """open_clip's models may hold a scale in one dimension."""
    return value.squeeze() if isinstance(value, Tensor) else value


def _group(rank: int, world_size: int) -> Any:
    if world_size == 1:
        return None
    here = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if here != (rank, world_size):
        raise ValueError(
            "rank, world_size: expected those of torch.distributed's default group, "
            f"{here}, got {(rank, world_size)}"
        )
    return dist.group.WORLD
