"""A ring of processes: blocks of rows travel from rank to rank, and none ever holds all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The ranks of a group. At step t a rank has the block of the rank t places before it."""

    def __init__(self, group: dist.ProcessGroup, count: int, device: torch.device):
        sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
        dist.all_gather(list(sizes.unbind()), torch.tensor(count, device=device), group=group)
        self.group, self.world, self.rank = group, group.size(), group.rank()
        self.sizes = sizes.tolist()  # the one wait for the device: batches may differ
        self.total = sum(self.sizes)

    def blocks(self, *tensors: Tensor, steps: int | None = None) -> Iterator[list[Tensor]]:
        """The tensors of this rank, then of the rank before it, and so on; each is contiguous.

        The first dimension of all tensors counts the rows. Beside its own block a rank has two: the
        one at hand, and the next, which arrives meanwhile. After the next step a block is no more.
        """
        steps = self.world if steps is None else steps
        block, most = [t.detach().contiguous() for t in tensors], max(self.sizes)
        buffers = [
            [t.new_empty(most, *t.shape[1:]) for t in tensors] for _ in range(min(steps, 3) - 1)
        ]
        for step in range(steps):
            last = step + 1 == steps
            coming = None if last else Message(self, block, step, 1, buffers[step % len(buffers)])
            yield block
            block = [] if coming is None else coming.arrived()

    def sum(self, count: Tensor) -> Tensor:
        count = count.clone()
        dist.all_reduce(count, group=self.group)
        return count


class Message:
    """The tensors of the block of a step on their way, and others on theirs to this rank."""

    def __init__(
        self, ring: Ring, tensors: list[Tensor], step: int, distance: int,
        buffers: list[Tensor] | None = None,
    ):  # fmt: skip
        sender = (ring.rank - distance) % ring.world
        rows = ring.sizes[(sender - step) % ring.world]
        self.sent = tensors
        if buffers is None:
            self.received = [t.new_empty(rows, *t.shape[1:]) for t in tensors]
        else:
            self.received = [buffer[:rows] for buffer in buffers]
        receiver = (ring.rank + distance) % ring.world
        ends = ((dist.isend, self.sent, receiver), (dist.irecv, self.received, sender))
        operations = [
            # bytes travel, so every dtype does
            dist.P2POp(
                way,
                t.as_strided((t.numel(),), (1,)).view(torch.uint8),  # one row may have stride 0
                dist.get_global_rank(ring.group, peer),
                ring.group,
            )
            for way, tensors, peer in ends
            for t in tensors
            if t.numel()
        ]
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def arrived(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.sent = []
        return self.received


class Passenger:
    """A tensor that travels with the blocks, changed by every rank; home after step `last`."""

    def __init__(self, ring: Ring, last: int):
        self.ring, self.last = ring, last
        self.coming: Message | None = None

    def take(self) -> Tensor | None:
        """What the ranks before made of it, None on the first; after `last`, this rank's own."""
        coming, self.coming = self.coming, None
        return None if coming is None else coming.arrived()[0]

    def give(self, tensor: Tensor, step: int) -> None:
        distance = 1 if step < self.last else -step
        self.coming = Message(self.ring, [tensor], step, distance)


def ring_of(group: dist.ProcessGroup | None, count: int, device: torch.device) -> Ring | None:
    """None where there is nobody to exchange `count` rows with."""
    return None if group is None or group.size() == 1 else Ring(group, count, device)


def no_classes(rows: Tensor, planes: int, lowest: tuple[int, ...] = (0,)) -> Tensor:
    """The statistics of rows that met no class yet; the planes that hold a maximum are -inf."""
    state = rows.new_zeros((rows.shape[0], planes), dtype=torch.float64)
    state[:, list(lowest)] = -torch.inf
    return state


def gradients(
    ring: Ring, part: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, need_sent: bool
) -> tuple[Tensor, Any]:
    """Sums of the gradients of what stays and of what travels, of which `part` gives those of step.

    The second sum travels with its rows. The alternative, in which queries and upstream gradients
    travel too and every rank makes the whole gradients of its own rows, has four products of each
    pair where one for the coefficients and two for the gradients do, and as many bytes in float32.
    """
    sums = Passenger(ring, ring.world - 1)
    total: Any = None  # a tensor after the first block, which is this rank's own
    for step, block in enumerate(ring.blocks(*tensors)):
        stays, travels = part(step, *block)
        total = stays if total is None else total.add_(stays)
        if need_sent:
            before = sums.take()
            sums.give(travels if before is None else travels.add_(before), step)
    return total, sums.take()
