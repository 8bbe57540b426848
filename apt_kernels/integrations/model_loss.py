"""The loss of a language model of transformers, made inside the model's output layer.

A call with labels runs the model's own `forward` without them. Where that would make the logits,
the output layer gives the loss of its input instead, so the logits never exist. What the model does
to its logits afterwards (a scale, a cap) and whether its labels are shifted is asked of the model
itself when the loss is applied, with logits made up for the purpose.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.logprobs.linear_cross_entropy import linear_cross_entropy
from .output_layer import OutputLayer

IGNORED = -100
LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "return_dict")


class CannotApply(ValueError):
    """A model whose loss is not understood."""


class ModelLoss:
    """What is known of a model's loss, and how often it was made here. It holds no module.

    Args:
        model: a causal or masked language model, which is called three times on eight tokens.
        label_smoothing: of the loss, in [0, 1).
        logits: "evaluation": a model in evaluation mode returns them; "never": not with labels.
        backend: of the kernel.

    Raises:
        CannotApply: the model's loss is something else.
    """

    def __init__(
        self, model: Any, label_smoothing: float, logits: str, backend: str | None
    ) -> None:
        self.label_smoothing, self.logits, self.backend = label_smoothing, logits, backend
        self.taken, self.with_logits = 0, 0
        self.refused: dict[str, int] = {}
        self.position = _position_of_labels(type(model))
        self.logit_scale, self.softcap, self.shifts, self.adds_router_loss = _ask(model)

    def call(self, model: Any, original: Callable, args: tuple, kwargs: dict) -> Any:
        """The model's forward pass: `original`, or the one that makes the loss here."""
        if self.position is not None and len(args) > self.position:
            kwargs = kwargs | {"labels": args[self.position]}
            args = (*args[: self.position], None, *args[self.position + 1 :])
        targets = self._targets(kwargs)
        reason = self._reason(model, targets, kwargs)
        if reason is not None:
            self._refuse(reason)
            return original(model, *args, **kwargs)
        if targets is None:
            return original(model, *args, **kwargs)
        if self.logits == "evaluation" and not model.training:
            self._count("with_logits")
            return self._with_logits(model, original, args, kwargs, targets)
        return self._fused(model, original, args, kwargs, targets)

    def _targets(self, kwargs: dict) -> Tensor | None:
        """The id that each position predicts, or None."""
        if kwargs.get("shift_labels") is not None and self.shifts:
            return kwargs["shift_labels"]
        labels = kwargs.get("labels")
        if labels is None or not self.shifts:
            return labels
        return F.pad(labels[..., 1:], (0, 1), value=kwargs.get("ignore_index", IGNORED))

    def _reason(self, model: Any, targets: Tensor | None, kwargs: dict) -> str | None:
        """Why this call goes to the model's own forward pass, or None."""
        if targets is None:
            trains = model.training and torch.is_grad_enabled()
            return "no labels came with the call" if trains else None
        kept = kwargs.get("logits_to_keep", 0)
        if isinstance(kept, Tensor) or kept:
            return "logits_to_keep asks for a part of the logits"
        routed = kwargs.get("output_router_logits", _text_config(model, "output_router_logits"))
        if routed and not self.adds_router_loss:
            return "the loss of its routers is not understood"
        return _reason_of_layer(model.get_output_embeddings())

    def _count(self, what: str) -> None:
        """Counts a call, but not within torch.compile, which would compile for every count."""
        if not torch.compiler.is_compiling():
            setattr(self, what, getattr(self, what) + 1)

    def _refuse(self, reason: str) -> None:
        if torch.compiler.is_compiling():
            warnings.warn(f"apt_kernels: the model makes its own loss, as {reason}", stacklevel=2)
            return
        if reason not in self.refused:
            warnings.warn(f"apt_kernels: the model makes its own loss, as {reason}", stacklevel=4)
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def _fused(
        self, model: Any, original: Callable, args: tuple, kwargs: dict, targets: Tensor
    ) -> Any:
        layer = model.get_output_embeddings()
        made: list[Tensor] = []

        def answer(hidden: Tensor) -> Tensor:
            if made or hidden.shape[:-1] != targets.shape:
                made.clear()
                return F.linear(hidden, layer.weight, layer.bias)
            # Shaped as logits are. The loss of the model is of this very tensor, and so a wrapper
            # that hooks what the layer returns (FSDP) sees the backward pass.
            made.append(self._loss(hidden, layer, targets, kwargs).reshape(1, 1, 1))
            return made[0]

        inner = {k: v for k, v in kwargs.items() if k not in LOSS_ARGUMENTS}
        with OutputLayer(layer).answering(answer):
            outputs = original(model, *args, **inner, return_dict=True)
        if not made:
            self._refuse("its output layer was not called once with one row a label")
            return original(model, *args, **kwargs)
        self._count("taken")
        return _with_loss(model, outputs, made[0].reshape(()), kwargs)

    def _loss(self, hidden: Tensor, layer: nn.Linear, targets: Tensor, kwargs: dict) -> Tensor:
        return linear_cross_entropy(
            hidden,
            layer.weight,
            targets.to(hidden.device),
            bias=layer.bias,
            ignore_index=kwargs.get("ignore_index", IGNORED),
            label_smoothing=self.label_smoothing,
            normalizer=_normalizer(kwargs.get("num_items_in_batch"), hidden.device),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            backend=self.backend,
        )

    def _with_logits(
        self, model: Any, original: Callable, args: tuple, kwargs: dict, targets: Tensor
    ) -> Any:
        """The model's own results; a smoothed loss is made of its logits."""
        if not self.label_smoothing:
            return original(model, *args, **kwargs)
        inner = {k: v for k, v in kwargs.items() if k not in LOSS_ARGUMENTS}
        outputs = original(model, *args, **inner, return_dict=True)
        count = _normalizer(kwargs.get("num_items_in_batch"), outputs.logits.device)
        loss = F.cross_entropy(
            outputs.logits.float().flatten(0, -2),
            targets.to(outputs.logits.device).flatten(),
            ignore_index=kwargs.get("ignore_index", IGNORED),
            label_smoothing=self.label_smoothing,
            reduction="mean" if count is None else "sum",
        )
        loss = loss if count is None else loss / count
        return _with_loss(model, outputs, loss, kwargs, logits=outputs.logits)


def patched(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of models that is `kind` but for its forward pass, which asks the model's loss."""
    original = kind.forward

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.apt_loss.call(self, original, args, kwargs)

    def reduce(self, protocol: int) -> tuple:
        """Copies and pickles name the model's own class: this one is made again."""
        return _empty, (kind,), vars(self)

    fields = {"forward": forward, "__reduce_ex__": reduce, "apt_original": kind}
    fields |= {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), fields)


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = patched(kind)
    return made.__new__(made)


def _with_loss(
    model: Any, outputs: Any, loss: Tensor, kwargs: dict, logits: Tensor | None = None
) -> Any:
    """The outputs as the model gives them with labels."""
    router_loss = getattr(outputs, "aux_loss", None)
    if router_loss is not None:
        loss = loss + model.router_aux_loss_coef * router_loss.to(loss.device)
    others = {name: value for name, value in outputs.items() if name not in ("loss", "logits")}
    outputs = type(outputs)(loss=loss, logits=logits, **others)
    as_dict = kwargs.get("return_dict")
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    return outputs if as_dict else outputs.to_tuple()


def _normalizer(count: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    if isinstance(count, Tensor):
        return count.to(device=device, dtype=torch.float32).reshape(()).clamp(min=1)
    return None if count is None else max(count, 1)


def _text_config(model: Any, name: str) -> Any:
    return getattr(model.config.get_text_config(), name, None)


def _position_of_labels(kind: type[nn.Module]) -> int | None:
    """The place of `labels` among the arguments after self."""
    names = list(inspect.signature(kind.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _reason_of_layer(layer: Any) -> str | None:
    """Why a loss cannot be made in this output layer, or None."""
    if not isinstance(layer, nn.Linear) or not OutputLayer(layer).is_unchanged():
        kind = type(layer)
        patch = " with a patched forward" if "forward" in getattr(layer, "__dict__", {}) else ""
        return f"its output layer is a {kind.__module__}.{kind.__qualname__}{patch}"
    if hasattr(layer.weight, "ds_id"):
        return "its output layer is sharded by DeepSpeed ZeRO-3"
    if not layer.weight.is_floating_point():
        return f"its output layer holds {layer.weight.dtype}"
    return None


@torch.no_grad()
def _ask(model: Any) -> tuple[float, float | None, bool, bool]:
    """The scale and the cap of the logits, whether labels are shifted, whether routers add a loss.

    Raises:
        CannotApply: the loss is not the cross-entropy of the labels.
    """
    layer = model.get_output_embeddings()
    reason = _reason_of_layer(layer)
    if reason is None and layer.weight.is_meta:
        reason = "its weights are on the meta device"
    if reason is None and type(layer.weight.data).__name__ == "DTensor":
        reason = "its output layer is sharded already: apply this before the model is sharded"
    if reason is not None:
        raise CannotApply(reason)
    device = model.get_input_embeddings().weight.device
    vocabulary = layer.weight.shape[0]
    ids = torch.arange(8, device=device).reshape(1, 8) % vocabulary
    head = OutputLayer(layer)
    try:
        with _evaluating(model):
            head.probe(lambda: model(input_ids=ids).logits, device)
            shifts = _shifts(model, head, ids)
            routed = bool(_text_config(model, "output_router_logits") is not None)
            adds = routed and _shifts(model, head, ids, output_router_logits=True) is shifts
    except CannotApply:
        raise
    except Exception as error:
        raise CannotApply(f"a trial with eight tokens failed: {error}") from error
    if shifts is None:
        raise CannotApply("its loss is not the mean cross-entropy of its logits and the labels")
    return head.logit_scale, head.softcap, shifts, adds


def _shifts(model: Any, head: OutputLayer, ids: Tensor, **more: Any) -> bool | None:
    """Whether position i predicts label i + 1, else i; None: the loss is neither."""
    vocabulary = head.layer.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(*ids.shape, vocabulary, generator=generator).to(ids.device)
    labels = torch.arange(3, 11, device=ids.device).reshape(1, 8) % vocabulary
    with head.answering(lambda hidden: logits.reshape(*hidden.shape[:-1], vocabulary)):
        outputs = model(input_ids=ids, labels=labels, **more)
    loss = float(outputs.loss)
    if getattr(outputs, "aux_loss", None) is not None:
        loss -= float(model.router_aux_loss_coef * outputs.aux_loss)
    rows = head.finished(logits)[0]
    as_they_are = float(F.cross_entropy(rows, labels[0]))
    shifted = float(F.cross_entropy(rows[:-1], labels[0, 1:]))
    for shifts, wanted in ((True, shifted), (False, as_they_are)):
        if abs(loss - wanted) <= 1e-3 * abs(wanted):
            return shifts
    return None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation mode within this context, afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
