"""The layer of a model that makes logits: asked what becomes of them, or made to answer else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.logprobs.token_logprobs import token_logprobs

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a PyTorch built without torch.distributed
    FSDPModule = ()  # type: ignore[misc,assignment]

SMALL, LARGE = 2.0**-10, 2.0**20  # where tanh is the identity, and where it has reached its bound
PROBES = (LARGE, SMALL, 1.0, -7.0, 40.0, 0.3)


@dataclass
class OutputLayer:
    """The layer that makes logits, and what the model does to them afterwards."""

    layer: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def is_unchanged(self) -> bool:
        """Returns whether the layer still is a plain linear layer, no adapter or patch on it."""
        kind = type(self.layer)
        plain = kind is nn.Linear or (issubclass(kind, FSDPModule) and nn.Linear in kind.__bases__)
        return plain and "forward" not in vars(self.layer)

    @contextmanager
    def answering(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The layer computes `forward(hidden)` within this context."""
        vars(self.layer)["forward"] = forward  # torch.compile follows this, not an attribute's del
        try:
            yield
        finally:
            vars(self.layer).pop("forward")

    def finished(self, logits: Tensor) -> Tensor:
        """Returns the layer's outputs with the scale and the cap."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def probe(self, call: Callable[[], Tensor], device: torch.device) -> None:
        """Asks the model, by `call()`, what it does to its logits: sets the scale and the cap.

        Raises:
            ValueError: it does something else.
        """
        probes = torch.tensor(PROBES, dtype=torch.float64, device=device)
        with self.answering(lambda hidden: probes.expand(*hidden.shape[:-1], -1).clone()):
            answer = call()
        answer, probes = answer[0, -1].to("cpu", torch.float64), probes.cpu()
        bound, scale = float(answer[0]), float(answer[1]) / SMALL
        scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        softcap = bound if abs(bound) < 0.5 * abs(scale) * LARGE else None
        self.logit_scale, self.softcap = scale, softcap
        ours, theirs, every = scale * probes[1:], answer[1:], torch.arange(len(PROBES) - 1)
        ours = token_logprobs(ours.expand(len(every), -1), every, softcap=softcap)
        theirs = token_logprobs(theirs.expand(len(every), -1), every)
        if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            raise ValueError("it changes its logits by more than a scale and a tanh cap")
