"""MoCo's slowly following networks and its queue of keys (He et al. 2020).

The networks are float32 whatever the encoder is: of 16 bits, a step of 0.1 % of a difference would
be rounded away.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from apt_kernels import ema_update_, queue_push_

from ..scoring.model_access import FSDPModule, without_wrapper
from ..training.state import load_module_state, module_state, snapshot

UNKNOWN = -1  # the id of a sample that is not told


class MomentumNetworks:
    """Frozen copies of an encoder and its projection that follow them, and the queue of keys.

    Args:
        encoder: the one that is trained; DDP-wrapped or not.
        projection: its head.
        projection_momentum: a module of the same kind, which becomes equal to it.
        size: of the queue: width and number of the keys.
        momentum: how much of itself a copy keeps at a step.
        encoder_momentum: None: a copy; needed where the encoder is FSDP2-sharded.
        backend: of the kernels.
        groups: of the processes whose queues are alike and hold the keys of all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projection: nn.Module,
        projection_momentum: nn.Module,
        size: tuple[int, int],
        momentum: float,
        encoder_momentum: nn.Module | None = None,
        backend: str | None = None,
        groups: Sequence[Any] = (),
    ) -> None:
        if encoder_momentum is None and isinstance(encoder, FSDPModule):
            raise ValueError(
                "an FSDP2-sharded encoder cannot be copied: pass encoder_momentum=, sharded the "
                "same way"
            )
        self._trained = (without_wrapper(encoder), projection)
        if encoder_momentum is None:
            encoder_momentum = copy.deepcopy(self._trained[0])
        self.encoder = _frozen(_in_float32(encoder_momentum))
        self.projection = _frozen(_in_float32(projection_momentum))
        self._momentum = momentum
        self._backend = backend
        self._groups = groups
        self._follow(0.0, [*self._trained[0].parameters(), *projection.parameters()])
        self._size = size
        self.register_queue()

    def register_queue(self) -> None:
        """Fills the queue `(dim, K)` with random keys of unit length and begins it anew."""
        like = next(t for t in self._trained[0].parameters() if t.is_floating_point())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.queue = F.normalize(torch.randn(self._size).to(like.device, dtype), dim=0)
        for group in self._groups:
            dist.broadcast(self.queue, group=group, group_src=0)
        self.pointer = torch.zeros(1, dtype=torch.long, device=like.device)
        self._ids = torch.full(self._size[1:], UNKNOWN)  # of the samples of the keys; on the CPU
        self._next = 0  # the pointer, without asking the device

    def follow(self) -> None:
        """Moves the copies towards what is trained; buffers are copied."""
        trained = (p for module in self._trained for p in module.parameters())
        self._follow(self._momentum, [p for p in trained if p.requires_grad])

    @torch.no_grad()
    def _follow(self, momentum: float, moved: Sequence[Tensor]) -> None:
        wanted = {id(p) for p in moved}
        pairs: list[tuple[Tensor, Tensor]] = []
        buffers: list[tuple[Tensor, Tensor]] = []
        for copied, trained in zip((self.encoder, self.projection), self._trained, strict=True):
            if isinstance(copied, FSDPModule):
                copied.reshard()  # after a forward without a backward it still is whole
            both = zip(copied.parameters(), trained.parameters(), strict=True)
            pairs += [(_local(a), _local(b)) for a, b in both if id(b) in wanted]
            buffers += zip(copied.buffers(), trained.buffers(), strict=True)
        for moving, keep in ((pairs, momentum), (buffers, 0.0)):
            targets, sources = [a for a, _ in moving], [b for _, b in moving]
            ema_update_(targets, sources, keep, backend=self._backend)

    def push(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Puts keys `(N, dim)` of all processes into the queue, in the order of the ranks.

        Args:
            keys: of this process.
            ids: `(N,)`, the numbers of their samples; None: they are not known.
        """
        if ids is None:
            ids = torch.full(keys.shape[:1], UNKNOWN)
        if self._groups:
            column = ids.to(keys.device).unsqueeze(1)
            for group in self._groups:
                keys, column = gather_rows(keys, group), gather_rows(column, group)
            ids = column.flatten().cpu()
        queue_push_(self.queue, self.pointer, keys, backend=self._backend)
        size = len(self._ids)
        places = torch.arange(self._next, self._next + len(ids))[-size:] % size
        self._ids[places] = ids[-size:]
        self._next = (self._next + len(ids)) % size

    def same_samples(self, ids: Tensor | None) -> Tensor | None:
        """Returns which keys are of the samples `ids` `(B,)`, `(B, K)`; None where none is."""
        if ids is None or not torch.isin(ids, self._ids).any():
            return None
        return ids.unsqueeze(1) == self._ids

    def state_dict(self) -> dict[str, Any]:
        """Returns the copies, the queue and its pointer."""
        return {
            "encoder": snapshot(module_state(self.encoder)),
            "projection": snapshot(module_state(self.projection)),
            "queue": snapshot(self.queue),
            "pointer": snapshot(self.pointer),
            "ids": snapshot(self._ids),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`."""
        if state["queue"].shape != self.queue.shape:
            raise ValueError(
                f"the state has a queue {tuple(state['queue'].shape)}, "
                f"this trainer {tuple(self.queue.shape)}"
            )
        load_module_state(self.encoder, state["encoder"])
        load_module_state(self.projection, state["projection"])
        self.queue.copy_(state["queue"])
        self.pointer.copy_(state["pointer"])
        self._ids.copy_(state["ids"])
        self._next = int(self.pointer)


@torch.no_grad()
def gather_rows(rows: Tensor, group: Any) -> Tensor:
    """Returns the rows of all processes of a group, in their order; they may bring several."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def _in_float32(module: nn.Module) -> nn.Module:
    """Returns the module with its 16-bit parameters and buffers in float32."""
    dtypes = {t.dtype for t in (*module.parameters(), *module.buffers())}
    if not dtypes & {torch.float16, torch.bfloat16}:
        return module
    if isinstance(module, FSDPModule):
        raise ValueError(
            "encoder_momentum: expected float32 parameters, got sharded ones of 16 bits"
        )
    return module.float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
