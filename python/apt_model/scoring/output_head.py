"""The layer of a model that makes logits, and what is wanted of a pass over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt_kernels import token_logprobs

from .model_access import FSDPModule, without_wrapper

SMALL, LARGE = 2.0**-10, 2.0**20  # where tanh is the identity, and where it has reached its bound
PROBES = (LARGE, SMALL, 1.0, -7.0, 40.0, 0.3)


@dataclass
class OutputHead:
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
        self.layer.forward = forward  # type: ignore[method-assign,assignment]  # until the end
        try:
            yield
        finally:
            del self.layer.forward

    @contextmanager
    def adding_rows(self, embedding: nn.Module | None) -> Iterator[Tensor | None]:
        """Within this context `embedding`, tied to the layer, adds rows to the layer's gradient.

        Gives the weight to be used for the layer, or None: its own. Of the embedding's gradient
        only the rows of the batch's tokens are not 0; autograd would make a second tensor of the
        weight's size for it, at the end of the backward pass, where memory is at its peak. It adds
        what is dense to what is sparse in place, in this order alone: so the layer's gradient takes
        a node that is older than the embedding's, of which autograd makes the younger ones first.

        On CPUs only: elsewhere rows are added in no fixed order. Of 16-bit weights the sum would be
        rounded once a token.
        """
        weight = self.layer.weight
        tied: Any = embedding
        adds = (
            type(embedding) is nn.Embedding
            and embedding.weight is weight
            and type(weight) is nn.Parameter  # neither a shard
            and weight.requires_grad
            and torch.is_grad_enabled()
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.float64)
            and not (tied.sparse or tied.scale_grad_by_freq)
        )
        if not adds:
            yield None
            return
        tied.sparse = True
        try:
            yield _LateGradient.apply(weight)
        finally:
            tied.sparse = False

    @contextmanager
    def answers(self) -> Iterator[list[Tensor]]:
        """Collects the layer's outputs within this context."""
        made: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda _layer, _given, output: made.append(output))
        try:
            yield made
        finally:
            hook.remove()

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


class _LateGradient(torch.autograd.Function):
    """The weight; its gradient waits until younger nodes have made theirs. (That of a view would
    not be added in place.)"""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class Scoring:
    """The results that a pass over tokens is asked for.

    Attributes:
        temperature: the logits are divided by it.
        entropy: whether the entropies of the full distributions are wanted.
        value_head: a `ValueHead` of the model, wrapped or not, or None.
    """

    temperature: float = 1.0
    entropy: bool = False
    value_head: nn.Module | None = None

    @property
    def value_source(self) -> nn.Module | None:
        """The layer whose input is valued."""
        return None if self.value_head is None else without_wrapper(self.value_head).source

    def values(self, hidden: Tensor) -> Tensor | None:
        """Returns the value `(B, S-1)` before each token but the first, of `(B, S, H)`."""
        return None if self.value_head is None else self.value_head(hidden)[:, :-1, 0]


LOGPS_ONLY = Scoring()


@dataclass
class TokenScores:
    """Of each token but the first, `(B, S-1)`; what was not wanted is None.

    Attributes:
        logps: its log-probability.
        entropy: of the distribution it was drawn from.
        values: the value before it.
        balance: of the whole pass, 0-dim: the weighted balancing loss of a mixture of experts.
    """

    logps: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    balance: Tensor | None = None
