"""The command `apt-model merge`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ADAPTER = "adapter_config.json"
OF_ADAPTER = (ADAPTER, "adapter_model.safetensors", "adapter_model.bin", "README.md")


@dataclass(kw_only=True)
class MergeOptions:
    """Folders."""

    model: Path = field(
        metadata={
            "metavar": "FOLDER",
            "help": "folder of an adapter, or output folder of a run that trained one",
        }
    )
    output: Path = field(
        metadata={"metavar": "FOLDER", "help": "the model with the adapter in it goes here"}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "GGUF file inside the folder of the base model"},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type of the parameters"}
    )

    def check(self) -> None:
        """Raises where there is no adapter, or already something at the output."""
        from .folders import model_folder

        if not (model_folder(self.model) / ADAPTER).is_file():
            raise FileNotFoundError(f"{self.model} holds no {ADAPTER}: it is no adapter's folder")
        if self.output.exists():
            raise FileExistsError(f"--output {self.output} exists")


@dataclass(kw_only=True)
class Options:
    """Merge an adapter into its base model: the result needs no peft and answers the same."""

    folders: MergeOptions


def run(options: Options) -> int:
    """Writes the merged model."""
    import torch

    from ..scoring.loading import adapted_kind, load_model
    from ..scoring.saving import save_model
    from ..training.files import write_whole
    from .folders import model_folder
    from .reward_folder import CLASSIFIER, name_padding

    given = options.folders
    folder = model_folder(given.model)
    kind, more = adapted_kind(folder)
    model = load_model(
        folder, kind, getattr(torch, given.dtype), given.gguf_file, trainable=False, **more
    )
    tokenizer = _tokenizer(folder, given.gguf_file)
    merged = model.merge_and_unload()
    if kind == CLASSIFIER and tokenizer is not None:
        name_padding(merged.config, tokenizer)

    def save(path: Path) -> None:
        save_model(merged, path, tokenizer)
        for file in folder.iterdir():  # heads, image processors, how texts become tokens
            if file.name not in OF_ADAPTER and not (path / file.name).exists():
                copy = shutil.copytree if file.is_dir() else shutil.copy2
                copy(file, path / file.name)

    write_whole(given.output, save)
    print(f"wrote {given.output}")
    return 0


def _tokenizer(folder: Path, gguf_file: str | None) -> Any:
    """Returns the tokenizer of an adapter or of its base model; None where neither has one."""
    from ..scoring.loading import load_tokenizer

    try:
        return load_tokenizer(folder, gguf_file)
    except (OSError, ValueError):  # as of models of images
        return None
