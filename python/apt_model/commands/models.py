"""Which part of a model is trained, and how the trained model is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..scoring.loading import add_adapter
from ..scoring.model_access import train_last_layers
from ..scoring.saving import save_model
from ..training import processes
from .job import pretrained


def trained_part(
    options: Any, model: Any, none_is_possible: bool = False, wrap: bool = True
) -> Any:
    """Returns the model with the parts frozen that the options of a command do not train.

    With `--lora-rank` it is an adapter on the model that is trained. Of several processes it is
    wrapped, so that its gradients are averaged.

    Args:
        options: of the command.
        model: on any device.
        none_is_possible: whether `--train-last-layers 0` may freeze all of it.
        wrap: False: the caller wraps what it makes of the model.
    """
    count, rank = options.model.train_last_layers, options.model.lora_rank
    if options.training.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"--gradient-checkpointing: {type(model).__name__} does not have it")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if rank is not None and not options.model.has_folder_of_adapter:
        model = add_adapter(model, rank, options.model.lora_alpha, options.model.lora_targets)
    if count == 0 and none_is_possible:
        model.requires_grad_(False)
    elif count is not None:
        train_last_layers(model, count)
    return wrapped(options, model) if wrap else model


def wrapped(options: Any, model: Any) -> Any:
    """Returns the model as the processes of a run share it; of one process as it is."""
    return processes.wrapped(model, options.run.device, options.run.fsdp)


def reference_of(options: Any, folder: Path | None, needed: bool) -> Any:
    """Returns the frozen model a policy is compared with; None: the trainer knows one.

    That is a copy of the policy as it began, or the model without its adapter; "start": a copy of
    the adapter too.

    Args:
        options: of the command.
        folder: of the reference; None: where the policy began.
        needed: whether the policy is compared at all.
    """
    if needed and folder is None and options.model.has_adapter:
        return "start" if options.model.adapter_reference == "start" else None
    if not needed or (folder is None and not options.run.fsdp):
        return None
    # A sharded policy cannot be copied: it is loaded once more
    model = pretrained(options, "AutoModelForCausalLM", folder).requires_grad_(False)
    return wrapped(options, model) if options.run.fsdp else model


def without_pooler(model: Any) -> Any:
    """Returns an encoder whose pooler, of which no loss is formed, is frozen.

    It gets no gradient, and several processes wait for the gradient of what is not frozen. So it is
    with a head for next sentences.
    """
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in ("pooler", "seq_relationship"):
            part.requires_grad_(False)
    return model


def save_pretrained(model: Any, tokenizer: Any, options: Any) -> Callable[[Path], None]:
    """Returns what writes a Hugging Face model and its tokenizer into a folder."""
    merged = options.model.merge_adapter
    return lambda folder: save_model(model, folder, tokenizer, merged)
