"""How a user's encoder is called, and what it returns: hidden states, or one vector a sample."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..scoring.hidden_states import Positions, found, has_output_embedding, hidden_states_of
from ..scoring.model_access import FSDPModule, base_model, has_adapter, without_wrapper


class Encoded(NamedTuple):
    """The output of an encoder.

    Attributes:
        hidden: `(B, S, H)`, or `(B, H)` of an encoder that pools itself.
        pooler_output: `(B, H)` of models that have one (BERT), else None.
        nsp_logits: `(B, 2)` of models that predict the next sentence themselves, else None.
    """

    hidden: Tensor
    pooler_output: Tensor | None
    nsp_logits: Tensor | None = None

    @property
    def pooled(self) -> Tensor:
        """`(B, H)`: the pooler's output, else the first token's hidden state."""
        return self.hidden[:, 0] if self.pooler_output is None else self.pooler_output


class Encoder:
    """Calls one model; made once, as it reads the signature.

    The model is called as `model(input_ids=…, attention_mask=…)` with what its signature takes, and
    with its input as the only argument where it names that otherwise (encoders of images). It is
    asked for `output_hidden_states` where it takes that. The positions of masked token ids count
    real tokens alone, see `Positions`. Of a plain Hugging Face model with a head only the base
    model runs, unless it is asked for the `whole`.

    Args:
        model: any module, also DDP- or FSDP2-wrapped or adapted by PEFT.
        whole: run the model with its head, and ask for no hidden states: what is wanted of it is
            its `output`.
    """

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        inner = base_model(model)
        self._name = type(inner).__name__
        self._model = model
        has_head = has_output_embedding(inner)
        plain = model is without_wrapper(model) and not isinstance(model, FSDPModule)
        trunk = getattr(inner, "base_model", None)
        plain = plain and not whole and not has_adapter(model)
        if has_head and plain and isinstance(trunk, nn.Module):
            has_head = trunk is inner
            self._model = inner = trunk
        accepted = inspect.signature(inner.forward).parameters
        more = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self._by_name = "input_ids" in accepted or (more and len(accepted) == 1)
        self.takes_mask = "attention_mask" in accepted or (more and self._by_name)
        sizes = getattr(getattr(inner, "config", None), "type_vocab_size", 2)
        self.takes_token_types = "token_type_ids" in accepted and sizes > 1
        self._options: dict[str, Any] = {}
        if not whole and ("output_hidden_states" in accepted or (more and has_head)):
            self._options["output_hidden_states"] = True
        if "use_cache" in accepted:
            self._options["use_cache"] = False
        self._positions = Positions(self._model)

    def __call__(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Encoded:
        """Returns what the model makes of a batch.

        Args:
            inputs: `(B, S)` token ids, or images `(B, …)`.
            attention_mask: `(B, S)`, 1 = real token; None: all are.
            token_type_ids: `(B, S)`, 0 in the first segment, 1 in the second.
        """
        output = self.output(inputs, attention_mask, token_type_ids)
        pooled = found(output, "pooler_output")
        encoded = Encoded(pooled_map(hidden_states_of(output), pooled), pooled)
        if encoded.hidden.dim() not in (2, 3) or len(encoded.hidden) != len(inputs):
            raise ValueError(
                f"{self._name} must return (B, S, H) or (B, H) for a batch "
                f"{tuple(inputs.shape)}, got {tuple(encoded.hidden.shape)}"
            )
        return encoded

    def output(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Any:
        """Returns the model's own output; arguments as `__call__`."""
        options = dict(self._options)
        if not inputs.is_floating_point():
            inputs, positions = self._positions(inputs, attention_mask)
            options.update(positions)
        if self.takes_mask and attention_mask is not None:
            options["attention_mask"] = attention_mask
        if self.takes_token_types and token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        if self._by_name:
            return self._model(input_ids=inputs, **options)
        return self._model(inputs, **options)


def pooled_map(hidden: Tensor, pooled: Tensor | None) -> Tensor:
    """Returns `(B, C)` of the maps `(B, C, H, W)` of a convolutional encoder; others as they are.

    It is what the encoder's own pooler made `(B, C)` or `(B, C, 1, 1)`, else the mean over places.
    """
    if hidden.dim() != 4:
        return hidden
    if pooled is not None and pooled.shape[:2].numel() == pooled.numel():
        return pooled.flatten(1)
    return hidden.mean((2, 3))
