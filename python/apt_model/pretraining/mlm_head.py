"""The heads of masked-language modelling and next-sentence prediction (Devlin et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt_kernels import linear_cross_entropy, token_logprobs

from ..scoring.devices import evaluating
from ..scoring.model_access import as_autocast
from .own_head import OwnMLMHead, has_own_head

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
INITIAL_DEVIATION = 0.02  # of BERT's weights
LAYER_NORM_EPS = 1e-12  # BERT's


class MLMHead(nn.Module):
    """Predicts tokens from hidden states: dense, activation, layer norm, decoder.

    Args:
        hidden_size: of the hidden states.
        vocab_size: how many logits there are.
        hidden_act: "gelu", "relu", "silu" or "tanh".
        decoder: None: a layer of its own; an `nn.Linear`, or an `nn.Embedding`, whose weight is
            then shared (a tied decoder) and gets a bias of its own.
        backend: of the kernels.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        hidden_act: str = "gelu",
        decoder: nn.Linear | nn.Embedding | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {list(ACTIVATIONS)}, got {hidden_act!r}")
        if decoder is not None and tuple(decoder.weight.shape) != (vocab_size, hidden_size):
            raise ValueError(
                f"lm_head has a weight {tuple(decoder.weight.shape)}, vocab_size and hidden_size "
                f"are {(vocab_size, hidden_size)}"
            )
        self.dense = _linear(hidden_size, hidden_size)
        self.activation = ACTIVATIONS[hidden_act]()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        if isinstance(decoder, nn.Linear):
            self.decoder = decoder
        else:
            self.decoder = _linear(hidden_size, vocab_size)
            if decoder is not None:
                self.decoder.weight = decoder.weight
        self._backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits `(…, V)`; with labels the loss and how many are right, without them.

        Args:
            hidden_states: `(…, H)`.
            labels: `(…)`, -100 where nothing is predicted.
            normalizer: what the sum of losses is divided by; None: the number of labels.
        """
        features = self.layer_norm(self.activation(self.dense(hidden_states)))
        if labels is None:
            return self.decoder(features)
        return _cross_entropy(features, self.decoder, labels, normalizer, self._backend)


class NSPHead(nn.Module):
    """Tells from the pooled output whether the second segment follows: 0 = it does, 1 = random.

    Args:
        hidden_size: of the pooled output.
        backend: of the kernels.
    """

    def __init__(self, hidden_size: int, backend: str | None = None) -> None:
        super().__init__()
        self.classifier = _linear(hidden_size, 2)
        self._backend = backend

    def forward(
        self,
        pooled_output: Tensor,
        labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits `(B, 2)` of `(B, H)`; with labels `(B,)` as `MLMHead` does."""
        if labels is None:
            return self.classifier(pooled_output)
        return _cross_entropy(pooled_output, self.classifier, labels, normalizer, self._backend)


class GivenHead(nn.Module):
    """A whole head of the user's: any module that makes logits of hidden states.

    Args:
        head: called with `(N, H)`.
        hidden_size: H.
        vocab_size: how many logits it must make.
        backend: of the kernels.
        model: the encoder, whose dtype and device a head without parameters is tried in.
    """

    def __init__(
        self,
        head: nn.Module,
        hidden_size: int,
        vocab_size: int,
        backend: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self._backend = backend
        known = (p for module in (head, model or head) for p in module.parameters())
        like = next((p for p in known if p.is_floating_point()), torch.empty(0))
        with evaluating(head), torch.no_grad():
            made = head(torch.zeros(1, hidden_size, dtype=like.dtype, device=like.device)).shape
        if tuple(made) != (1, vocab_size):
            raise ValueError(f"lm_head makes {tuple(made)[1:]} logits, vocab_size is {vocab_size}")

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns what `MLMHead` does; labels all count."""
        logits = self.head(hidden_states)
        if labels is None:
            return logits
        count = max(labels.numel(), 1) if normalizer is None else normalizer
        logps = token_logprobs(logits, labels, backend=self._backend)
        return -logps.sum() / count, (logits.detach().argmax(-1) == labels).sum()


def make_mlm_head(
    lm_head: nn.Module | None,
    hidden_size: int,
    vocab_size: int,
    hidden_act: str,
    backend: str | None,
    model: nn.Module,
) -> nn.Module:
    """Returns a head of `model` around what the user gave: nothing, a decoder, or a whole head.

    Where nothing was given it is the head that the model has itself, if it has one.
    """
    if lm_head is None and has_own_head(model):
        return OwnMLMHead(model, hidden_size, vocab_size, backend)
    if lm_head is None or isinstance(lm_head, (nn.Linear, nn.Embedding)):
        return MLMHead(hidden_size, vocab_size, hidden_act, lm_head, backend)
    return GivenHead(lm_head, hidden_size, vocab_size, backend, model)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)
    nn.init.zeros_(layer.bias)
    return layer


def _cross_entropy(
    features: Tensor,
    layer: nn.Linear,
    labels: Tensor,
    normalizer: float | Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    features, weight, bias = as_autocast(features, layer.weight, layer.bias)
    return linear_cross_entropy(
        features,
        weight,
        labels,
        bias=bias,
        normalizer=normalizer,
        return_correct=True,
        backend=backend,
    )
