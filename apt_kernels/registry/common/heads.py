"""Output heads for the samples of the operations over hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entry import seeded


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = seeded(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def ids(*shape: int, vocab: int, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, shape, generator=seeded(seed))


def hidden_and_weight(
    *rows: int, features: int, vocab: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits of standard deviation `scale`; both require grad."""
    hidden = normal(*rows, features, dtype=dtype, seed=seed)
    weight = normal(vocab, features, dtype=dtype, scale=scale / features**0.5, seed=seed + 1)
    return hidden.requires_grad_(), weight.requires_grad_()
