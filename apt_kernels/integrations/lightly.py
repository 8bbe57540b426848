"""lightly's NT-Xent loss under its own name. Nothing of lightly is imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..ops.contrastive.info_nce import info_nce
from ..ops.contrastive.nt_xent import nt_xent
from ..ops.contrastive.queue_push_ import queue_push_


class NTXentLoss(nn.Module):
    """`nt_xent`; with a memory bank `info_nce` against it.

    Args:
        temperature: the similarities are divided by it, above 0.
        memory_bank_size: 0, or `(keys, width)` of a bank of negatives. Keys go round in it, where
            lightly drops the rest of a batch that does not divide the bank.
        gather_distributed: the views of all processes are the classes; not with a memory bank.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        checks.flag("gather_distributed", gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        if memory_bank_size == 0:
            return
        if isinstance(memory_bank_size, int) or len(memory_bank_size) != 2:
            raise ValueError(
                f"memory_bank_size: expected 0 or (keys, width), got {memory_bank_size!r}"
            )
        if gather_distributed:
            raise ValueError("gather_distributed: expected False with a memory bank, got True")
        bank = nn.functional.normalize(torch.randn(*memory_bank_size), dim=-1)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss; the bank takes the keys out1 afterwards if the loss has a graph."""
        if not hasattr(self, "bank"):
            together = self.gather_distributed and dist.is_initialized()
            group = dist.group.WORLD if together else None
            return nt_xent(out0, out1, temperature=self.temperature, process_group=group)
        negatives = self.bank.clone()  # backward reads the keys that the push replaces
        loss = info_nce(out0, out1, negatives=negatives, temperature=self.temperature)
        if out0.requires_grad and torch.is_grad_enabled():
            queue_push_(self.bank.T, self.bank_ptr, nn.functional.normalize(out1.detach()))
        return loss
