"""The heads that a masked language model has itself, run at the masked tokens alone.

Nothing is known by name. The model runs as it is, but the hidden states that its trunk returns are
cut to the masked tokens before its head sees them. So whatever the head does (ALBERT's and
ELECTRA's narrower embeddings, ESM's bias beside its decoder) is done, for these tokens. Where the
head ends in a plain linear layer, that layer's place is taken by the loss, so that the logits never
exist; a head that does more with its logits is noticed on the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from apt_kernels import linear_cross_entropy, token_logprobs

from ..scoring.devices import device_of, evaluating
from ..scoring.hidden_states import found
from ..scoring.model_access import as_autocast, base_model
from ..scoring.output_head import OutputHead
from .encoder import Encoded

LOGITS = ("logits", "prediction_logits")  # of masked-LM outputs, of BertForPreTraining's
NSP_LOGITS = "seq_relationship_logits"


def has_own_head(model: nn.Module) -> bool:
    """Returns whether `model` is a transformers model that makes logits of a trunk's states."""
    inner = base_model(model)
    trunk = getattr(inner, "base_model", None)
    getter = getattr(inner, "get_output_embeddings", None)
    if not isinstance(trunk, nn.Module) or trunk is inner or not callable(getter):
        return False
    return getter() is not None


class OwnMLMHead(nn.Module):
    """The prediction head of a model, as a head of hidden states. It has no parameters of its own.

    Args:
        model: a masked language model of transformers, wrapped or not.
        hidden_size: width of its hidden states.
        vocab_size: how many logits it must make.
        backend: of the kernels.
    """

    def __init__(
        self, model: nn.Module, hidden_size: int, vocab_size: int, backend: str | None = None
    ) -> None:
        super().__init__()
        self._inner = [base_model(model)]  # not a submodule: its parameters are the model's
        self._backend = backend
        self._hidden_size = hidden_size
        with evaluating(model), torch.no_grad():
            output = self._output(self._zeros(1, hidden_size))
        logits, nsp = _logits(output), found(output, NSP_LOGITS)
        if logits.shape[-1] != vocab_size:
            raise ValueError(
                f"vocab_size: expected {logits.shape[-1]}, the logits of the model's own head, "
                f"got {vocab_size}"
            )
        self.has_nsp = nsp is not None and nsp.shape == (1, 2)
        layer = self._inner[0].get_output_embeddings()
        self._layer = OutputHead(layer) if isinstance(layer, nn.Linear) else None
        self._is_probed = False

    @property
    def _trunk(self) -> nn.Module:
        return self._inner[0].base_model

    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Returns what `MLMHead` does of hidden states `(…, H)`; labels all count."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if labels is None:
            logits = _logits(self._output(flat))
            return logits.reshape(*hidden_states.shape[:-1], -1)
        with self._making_loss(labels.flatten(), normalizer) as made:
            output = self._output(flat)
        return self._loss(made, output, labels.flatten(), normalizer)

    def nsp_logits(self, pooled_output: Tensor) -> Tensor:
        """Returns the logits `(B, 2)` of pooled outputs `(B, H)`."""
        zeros = self._zeros(1, self._hidden_size)
        return found(self._output(zeros, pooled_output), NSP_LOGITS)

    def of_pass(
        self,
        call: Callable[[], Any],
        positions: Tensor,
        labels: Tensor,
        normalizer: float | Tensor,
    ) -> tuple[Tensor, Tensor, Encoded]:
        """Runs the whole model once, its head at some tokens.

        Args:
            call: runs the model on a batch.
            positions: `(N,)`, places in the flattened batch.
            labels: `(N,)`, the tokens there.
            normalizer: the sum of losses is divided by it.

        Returns:
            The loss, how many predictions are correct, and what the model and its trunk returned.
        """
        seen: list[Encoded] = []

        def cut(_module: nn.Module, _given: Any, output: Any) -> Any:
            last = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
            seen.append(Encoded(last, found(output, "pooler_output")))
            rows = last.flatten(0, 1)[positions].unsqueeze(0)
            if isinstance(output, tuple):
                return (rows, *output[1:])
            return type(output)(**{**output, "last_hidden_state": rows})

        self._probe_once()
        hook = self._trunk.register_forward_hook(cut)
        try:
            with self._making_loss(labels, normalizer) as made:
                output = call()
        finally:
            hook.remove()
        loss, correct = self._loss(made, output, labels, normalizer)
        return loss, correct, seen[0]._replace(nsp_logits=found(output, NSP_LOGITS))

    def _output(self, flat: Tensor, pooled: Tensor | None = None) -> Any:
        """Returns the model's output where its trunk says these hidden states `(N, H)`."""
        pooled = flat[:1] if pooled is None else pooled
        said = _trunk_output()(last_hidden_state=flat[None], pooler_output=pooled)
        trunk, inner = self._trunk, self._inner[0]
        trunk.forward = lambda *args, **kwargs: said
        try:
            return inner(torch.zeros(1, 1, dtype=torch.long, device=flat.device))
        finally:
            del trunk.forward

    def _zeros(self, rows: int, width: int) -> Tensor:
        inner = self._inner[0]
        dtype = next(p.dtype for p in inner.parameters() if p.is_floating_point())
        return torch.zeros(rows, width, dtype=dtype, device=device_of(inner))

    @contextmanager
    def _making_loss(
        self, labels: Tensor, normalizer: float | Tensor | None
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within this context the last layer makes the loss of `labels`, which is yielded."""
        self._probe_once()
        made: list[tuple[Tensor, Tensor]] = []
        if self._layer is None:
            yield made
            return
        layer = self._layer.layer

        def loss_of(features: Tensor) -> Tensor:
            flat, weight, bias = as_autocast(features.flatten(0, -2), layer.weight, layer.bias)
            made.append(
                linear_cross_entropy(
                    flat,
                    weight,
                    labels,
                    bias=bias,
                    normalizer=normalizer,
                    return_correct=True,
                    backend=self._backend,
                )
            )
            return made[0][0] + 0 * features[..., :1]  # a part of the graph, whatever is hooked

        with self._layer.answering(loss_of):
            yield made

    def _loss(
        self,
        made: list[tuple[Tensor, Tensor]],
        output: Any,
        labels: Tensor,
        normalizer: float | Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = _logits(output)
        if made:
            loss, correct = made[0]
            return loss + 0 * logits.sum(), correct  # hooks of wrappers sit on the model's output
        logits = logits.flatten(0, -2)
        count = max(len(labels), 1) if normalizer is None else normalizer
        logps = token_logprobs(logits, labels, backend=self._backend)
        return -logps.sum() / count, (logits.detach().argmax(-1) == labels).sum()

    @torch.no_grad()
    def _probe_once(self) -> None:
        """Gives up the last layer's place where the model does more with its logits."""
        if self._is_probed or self._layer is None:
            return
        self._is_probed = True
        ran: list[bool] = []
        hook = self._layer.layer.register_forward_pre_hook(lambda *_: ran.append(True))
        zeros = self._zeros(1, self._hidden_size)
        try:
            self._layer.probe(lambda: _logits(self._output(zeros)), zeros.device)
            plain = self._layer.logit_scale == 1 and self._layer.softcap is None
        except Exception:  # whatever a model does with logits of another width
            plain = False
        finally:
            hook.remove()
        if not (plain and ran and self._layer.is_unchanged()):
            self._layer = None


class OwnNSPHead(nn.Module):
    """The next-sentence head of a model, as a head of pooled outputs; no parameters of its own.

    Args:
        head: the model's prediction head.
        backend: of the kernels.
    """

    def __init__(self, head: OwnMLMHead, backend: str | None = None) -> None:
        super().__init__()
        self._head = [head]
        self._backend = backend

    def forward(
        self, pooled_output: Tensor, labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Returns what `NSPHead` does."""
        logits = self._head[0].nsp_logits(pooled_output)
        return logits if labels is None else self.loss_of(logits, labels, normalizer)

    def loss_of(
        self, logits: Tensor, labels: Tensor, normalizer: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of logits `(B, 2)`, and how many are correct."""
        count = max(len(labels), 1) if normalizer is None else normalizer
        logps = token_logprobs(logits, labels, backend=self._backend)
        return -logps.sum() / count, (logits.detach().argmax(-1) == labels).sum()


@cache
def _trunk_output() -> type:
    """Returns the class of what a trunk may return, whatever else a model asks of it: None."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class TrunkOutput(BaseModelOutputWithPooling):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return TrunkOutput


def _logits(output: Any) -> Tensor:
    for name in LOGITS:
        if (logits := found(output, name)) is not None:
            return logits
    names = list(output) if isinstance(output, Mapping) else type(output).__name__
    raise ValueError(f"the model's own head: expected {' or '.join(LOGITS)}, got {names}")
