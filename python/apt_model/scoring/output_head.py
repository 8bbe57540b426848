"""The layer of a model that makes logits, and what is wanted of a pass over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt_kernels.integrations.output_layer import OutputLayer

from .model_access import without_wrapper


class OutputHead(OutputLayer):
    """The output layer of a model that is trained here."""

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
