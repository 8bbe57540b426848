"""Models and tokenizers from folders: whole models, GGUF files, adapters of PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ADAPTER = "adapter_config.json"


def load_tokenizer(folder: Path, gguf_file: str | None = None) -> Any:
    """Returns the tokenizer of a folder; the base model's where an adapter has none."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if is_adapter(folder) and not any(folder.glob("tokenizer*")):
        folder = base_folder(folder)
    return AutoTokenizer.from_pretrained(folder, **_gguf(folder, gguf_file))


def load_config(folder: Path, gguf_file: str | None = None) -> Any:
    """Returns the configuration of a folder's model; of the base model for an adapter."""
    from transformers import AutoConfig

    folder = base_folder(Path(folder)) if is_adapter(folder) else Path(folder)
    return AutoConfig.from_pretrained(folder, **_gguf(folder, gguf_file))


def load_model(
    folder: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    gguf_file: str | None = None,
    trainable: bool = True,
    **options: Any,
) -> Any:
    """Returns the model of a folder, which can be trained and saved.

    Args:
        folder: a model of transformers, or an adapter of PEFT, which comes on its base model.
        kind: the class of transformers that reads it, "AutoModelForCausalLM" say.
        dtype: dtype of the parameters; an adapter's are float32.
        gguf_file: of the model, inside its folder: its weights are taken as `dtype`.
        trainable: whether an adapter is to be trained.
        **options: of `from_pretrained`.

    Raises:
        ValueError, OSError: the folder holds no such model; the message names it.
    """
    import transformers

    folder = Path(folder)
    if is_adapter(folder):
        return _adapted(folder, kind, dtype, gguf_file, trainable, **options)
    gguf = _gguf(folder, gguf_file)
    if gguf and hasattr(transformers, "GgufConfig"):  # packed weights could not be trained
        gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader = getattr(transformers, kind)
    model, report = loader.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **gguf, **options
    )
    model.made_weights = sorted(report["missing_keys"])  # that the folder did not have
    return forget_quantization(model) if gguf else model


def masked_model_kind(folder: Path, nsp: bool = False) -> str:
    """Returns the class of transformers that reads a folder with heads for masked tokens.

    Args:
        folder: of the model.
        nsp: whether it is to have a head for next sentences too.

    Returns:
        "AutoModelForPreTraining" where next sentences are wanted or the folder has such a head,
        "AutoModelForMaskedLM", or "AutoModel" where transformers has no such head for the model.
    """
    from transformers.models.auto import modeling_auto as auto

    config = load_config(folder)
    kinds = auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING, auto.MODEL_FOR_PRETRAINING_MAPPING
    has_nsp = all(type(config) in kind for kind in kinds)
    made = (config.architectures or [""])[0].endswith("ForPreTraining")
    if has_nsp and (nsp or made):
        return "AutoModelForPreTraining"
    masked = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING
    return "AutoModelForMaskedLM" if masked else "AutoModel"


def forget_quantization(model: nn.Module) -> nn.Module:
    """Returns the model without the mark that its weights came quantised, which they are no more.

    transformers refuses to save a model that bears it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if str(getattr(method, "value", method)) != "gguf":
        return model
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("the model's weights are packed GGUF blocks: they cannot be trained")
    quantized: Any = model
    quantized.hf_quantizer, quantized.is_quantized = None, False
    for name in ("quantization_method", "_is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter of PEFT."""
    return (Path(folder) / ADAPTER).is_file()


def base_folder(folder: Path) -> Path:
    """Returns the folder of an adapter's base model, which may be told from the adapter's own.

    Raises:
        FileNotFoundError: it is not there.
    """
    name = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    for base in (Path(name or ""), folder / (name or "")):
        if (name and (base / "config.json").is_file()) or (any(base.glob("*.gguf")) and name):
            return base
    raise FileNotFoundError(
        f"{folder / ADAPTER}: base_model_name_or_path: expected the folder of the model that is "
        f"adapted, got {name!r}, which holds no model"
    )


def adapted_kind(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the class of transformers that an adapter adapts, and options to load it with.

    Args:
        folder: of the adapter. A classifier has as many labels as its saved head has rows.
    """
    import peft
    import transformers

    config = peft.PeftConfig.from_pretrained(folder)
    if config.task_type == peft.TaskType.SEQ_CLS:
        weights = peft.load_peft_weights(str(folder), device="cpu").items()
        rows = [len(w) for name, w in weights if "lora_" not in name and w.dim() == 2]
        return "AutoModelForSequenceClassification", {"num_labels": min(rows)} if rows else {}
    if config.task_type == peft.TaskType.CAUSAL_LM:
        return "AutoModelForCausalLM", {}
    kind = (config.auto_mapping or {}).get("base_model_class", "")
    return kind if hasattr(transformers, kind) else "AutoModel", {}


def _gguf(folder: Path, gguf_file: str | None) -> dict[str, Any]:
    """Returns how a GGUF file is told to `from_pretrained`: the only one where none is named."""
    if gguf_file is None and not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        gguf_file = found[0] if len(found) == 1 else None
    return {"gguf_file": gguf_file} if gguf_file and (folder / gguf_file).is_file() else {}


def _adapted(
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    gguf_file: str | None,
    trainable: bool,
    **options: Any,
) -> nn.Module:
    import peft

    base = load_model(base_folder(folder), kind, dtype, gguf_file, **options)
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    of_classifier = kind == "AutoModelForSequenceClassification"
    if of_classifier:
        config.task_type = peft.TaskType.SEQ_CLS  # its head is trained and saved too
    elif getattr(config, "task_type", None) == peft.TaskType.SEQ_CLS:
        config.task_type = config.modules_to_save = None
    model = peft.get_peft_model(base, config)
    own = peft.get_peft_model_state_dict(model)
    state = _named_as(own, peft.load_peft_weights(str(folder), device="cpu"), base)
    lost = [name for name in own if name not in state and "lora_" in name]
    if lost or not own.keys() & state.keys():
        raise ValueError(f"{folder}: the adapter does not fit {kind}: it has no {lost[:3]}")
    peft.set_peft_model_state_dict(model, {**own, **{k: v for k, v in state.items() if k in own}})
    return model if trainable else model.requires_grad_(False)


def _named_as(own: Mapping[str, Any], state: Mapping[str, Any], base: nn.Module) -> dict[str, Any]:
    """Returns an adapter's weights by the names of a base model with or without a head."""
    first, trunk = "base_model.model.", getattr(base, "base_model_prefix", "") + "."
    named = {}
    for name, value in state.items():
        rest = name.removeprefix(first)
        without, inside = first + rest.removeprefix(trunk), first + trunk + rest
        named[next((n for n in (name, without, inside) if n in own), name)] = value
    return named


def add_adapter(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None
) -> nn.Module:
    """Returns a model of transformers with a LoRA adapter, which is all that is trained (Hu 2021).

    A head that the model's folder did not have is trained with it.

    Args:
        model: of `load_model`.
        rank: of the adapter.
        alpha: the adapter's output is scaled by alpha / rank; None: twice the rank.
        targets: names of the layers that are adapted; None: all linear ones but the head.

    Raises:
        ValueError: the model has no such layer.
    """
    import peft

    kind = type(model).__name__
    task = peft.TaskType.CAUSAL_LM if kind.endswith(("ForCausalLM", "LMHeadModel")) else None
    if kind.endswith("ForSequenceClassification"):
        task = peft.TaskType.SEQ_CLS
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear" if targets is None else list(targets),
        task_type=task,
        modules_to_save=_made_modules(model) or None,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora-targets: {error}") from None


def _made_modules(model: nn.Module) -> list[str]:
    """Returns the modules whose weights are fresh, none of them shared with others."""
    made = getattr(model, "made_weights", [])
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    names = {name.rpartition(".")[0] for name in made}
    modules = dict(model.named_modules())
    return sorted(
        name
        for name in names
        if name in modules
        and not list(modules[name].children())
        and all(users[id(p)] == 1 for p in modules[name].parameters())
    )
