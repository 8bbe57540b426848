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
        memory_bank_size: 0, or `(keys, width)` of a bank of negatives, or the keys alone: the first
            batch then gives the width. Keys go round in the bank, where lightly drops the rest of a
            batch that does not divide the bank.
        gather_distributed: the views of all processes are the classes; with a memory bank, the bank
            takes the keys of all processes.
    """

    bank: Tensor
    bank_ptr: Tensor

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
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if len(size) not in (1, 2) or not all(isinstance(n, int) and n >= 0 for n in size):
            raise ValueError(
                f"memory_bank_size: expected 0, the keys or (keys, width), got {memory_bank_size!r}"
            )
        self.keys = size[0]
        self.register_buffer("bank", None, persistent=False)
        if self.keys and len(size) == 2:
            self._fill(torch.empty(0, size[1]))

    def _fill(self, like: Tensor) -> None:
        """Makes a bank of random directions, as wide and where `like` is."""
        bank = torch.randn(self.keys, like.shape[-1], device=like.device)
        self.bank = nn.functional.normalize(bank, dim=-1)
        pointer = torch.zeros(1, dtype=torch.long, device=like.device)
        self.register_buffer("bank_ptr", pointer, persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss; the bank takes the keys out1 afterwards if the loss has a graph."""
        together = self.gather_distributed and dist.is_initialized()
        group = dist.group.WORLD if together else None
        if not self.keys:
            return nt_xent(out0, out1, temperature=self.temperature, process_group=group)
        if self.bank is None:
            self._fill(out1)
        negatives = self.bank.clone()  # backward reads the keys that the push replaces
        loss = info_nce(out0, out1, negatives=negatives, temperature=self.temperature)
        if out0.requires_grad and torch.is_grad_enabled():
            keys = nn.functional.normalize(out1.detach())
            if group is not None:
                every = [torch.empty_like(keys) for _ in range(dist.get_world_size(group))]
                dist.all_gather(every, keys, group=group)
                keys = torch.cat(every)
            queue_push_(self.bank.T, self.bank_ptr, keys)
        return loss
