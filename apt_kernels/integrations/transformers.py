"""Hugging Face's masking collator on `mlm_mask`, and the loss of its models in one line.

`from apt_kernels.integrations.transformers import DataCollatorForLanguageModeling`
`from apt_kernels.integrations.transformers import apply_to_transformers`
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import checks
from ..ops.masking.masking_collator import MaskingCollator as DataCollatorForLanguageModeling
from . import trl
from .model_loss import CannotApply, ModelLoss, patched

__all__ = ["AppliedLoss", "DataCollatorForLanguageModeling", "apply_to_transformers"]


class AppliedLoss:
    """What `apply_to_transformers` did, to be counted and undone.

    Args:
        model: the model whose loss was applied.
        trainer: its trainer, where that was given.
        of_trl: the loss is that of TRL's own head, which `apply_to_trl` serves.
    """

    def __init__(self, model: Any, trainer: Any = None, of_trl: bool = False) -> None:
        self.model, self.trainer, self.of_trl = model, trainer, of_trl
        self._label_smoother = getattr(trainer, "label_smoother", None)

    def report(self) -> dict[str, Any]:
        """How the calls with labels went since the loss was applied.

        Returns:
            `{"taken": calls whose loss was made here, "with_logits": calls in evaluation mode that
            returned logits, "refused": {reason: calls that went to the model's own loss}}`; of
            TRL's own head `apt_kernels.integrations.trl.report()`.
        """
        if self.of_trl:
            return trl.report()
        loss = vars(self.model).get("apt_loss")
        if loss is None:
            return {"taken": 0, "with_logits": 0, "refused": {}}
        counts = {"taken": loss.taken, "with_logits": loss.with_logits}
        return counts | {"refused": dict(loss.refused)}

    def undo(self) -> None:
        """Gives the model its own forward pass back, and the trainer its label smoother.

        Raises:
            RuntimeError: the class of the model was changed since, by a wrapper that must go first.
        """
        if self.of_trl:
            trl.remove_from_trl()
            return
        if "apt_loss" not in vars(self.model):
            return
        kind: Any = type(self.model)
        if "apt_original" not in vars(kind):
            raise RuntimeError(f"model: expected the patched class, got {kind.__name__}")
        self.model.__class__ = kind.apt_original
        del self.model.apt_loss
        if self.trainer is not None:
            self.trainer.label_smoother = self._label_smoother


def apply_to_transformers(
    model: Any,
    *,
    label_smoothing: float = 0.0,
    logits: str = "evaluation",
    backend: str | None = None,
) -> AppliedLoss:
    """Computes the loss of a causal or masked language model from its hidden states.

    The loss is made inside `forward`, by `linear_cross_entropy`, under the caller's autocast and
    the hooks of DDP and FSDP; the logits never exist, and `outputs.logits` is None. The scale, the
    cap and the bias of the model's logits are kept. `num_items_in_batch`, `shift_labels` and
    `ignore_index` mean what they mean to transformers; `num_items_in_batch` counts for every model
    (BERT's own loss ignores it). A call that cannot be served goes to the model's own forward pass:
    it is counted with its reason, and the first of each reason warns. `torch.compile` makes one
    graph of the call, before or after this; calls of a compiled model are not counted. Tried with
    transformers 5.23.

    Args:
        model: the model, wrapped by PEFT or DDP or not; or a `transformers.Trainer`, whose label
            smoothing is then computed here too; or TRL's `SFTTrainer`, for which this is
            `apply_to_trl()`, as that trainer has a head of its own.
        label_smoothing: of the loss, in [0, 1); not with a trainer, which has its own.
        logits: "evaluation": a model in evaluation mode makes logits and returns them, as
            `compute_metrics` needs them. "never": no call with labels makes logits.
        backend: of `linear_cross_entropy`.

    Returns:
        An object with `report()`, which counts the calls, and `undo()`.

    Raises:
        ValueError: the model's loss is not understood (the message says why), or something else
            replaced its forward pass.
    """
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)
    checks.choice("logits", logits, ("evaluation", "never"))
    trainer = model if hasattr(model, "label_smoother") and hasattr(model, "args") else None
    if trainer is not None:
        if label_smoothing:
            raise ValueError("label_smoothing: expected 0 with a trainer, which has its own")
        model = trainer.model
        if type(trainer).__module__.startswith("trl.") and "forward" in vars(_inner(model)):
            return _apply_to_trls(trainer)
        label_smoothing = _smoothing_of(trainer)
    inner = _inner(model)
    applied = AppliedLoss(inner, trainer)
    given = vars(inner).get("apt_loss")
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "logits": logits,
        "backend": backend,
    }
    if given is not None:
        had = {name: getattr(given, name) for name in options}
        if had != options:
            raise ValueError(f"model: expected one without this loss, got one with {had}; undo it")
        return applied
    _check(inner)
    try:
        loss = ModelLoss(inner, **options)
    except CannotApply as error:
        raise ValueError(
            f"model: expected a causal or masked language model of transformers with a linear "
            f"output layer, got {type(inner).__name__}: {error}"
        ) from error
    inner.apt_loss = loss
    inner.__class__ = patched(type(inner))
    if trainer is not None:
        trainer.label_smoother = None
    return applied


def _inner(model: Any) -> Any:
    """The model of transformers within wrappers of DDP, torch.compile and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _check(model: Any) -> None:
    """Raises what cannot be a language model with a loss of its own, or is patched already."""
    wanted = "model: expected a causal or masked language model of transformers, got"
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{wanted} a {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{wanted} {kind}, an encoder-decoder, which makes inputs of its labels")
    if "forward" in vars(model):
        patch = vars(model)["forward"]
        module = getattr(patch, "__module__", "?")
        name = getattr(getattr(patch, "__func__", patch), "__qualname__", "?")
        raise ValueError(
            f"model: expected the model's own forward pass, got the one of {module} ({name}): undo "
            "that patch, or apply this loss before it"
        )


def _smoothing_of(trainer: Any) -> float:
    """The label smoothing of a trainer whose loss is that of its model."""
    if trainer.args.use_liger_kernel:
        raise ValueError(
            "model: expected a trainer without use_liger_kernel, which replaces the forward pass"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("model: expected a trainer without compute_loss_func, which takes logits")
    return float(trainer.args.label_smoothing_factor)


def _apply_to_trls(trainer: Any) -> AppliedLoss:
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            "model: expected TRL's trainer without label_smoothing_factor, with which it makes the "
            f"logits itself, got {trainer.args.label_smoothing_factor}"
        )
    trl.apply_to_trl()
    return AppliedLoss(trainer.model, trainer, of_trl=True)
