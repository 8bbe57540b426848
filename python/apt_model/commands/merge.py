"""The command `apt-model merge`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ADAPTER = "adapter_config.json"
MODELS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
}


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
    import peft
    import torch
    from transformers import AutoTokenizer

    from ..training.files import write_whole
    from .folders import model_folder

    given = options.folders
    folder = model_folder(given.model)
    task = json.loads((folder / ADAPTER).read_text()).get("task_type")
    loader = getattr(peft, MODELS.get(task, "AutoPeftModelForFeatureExtraction"))
    model = loader.from_pretrained(folder, dtype=getattr(torch, given.dtype))
    merged: Any = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def save(path: Path) -> None:
        merged.save_pretrained(path)
        tokenizer.save_pretrained(path)

    write_whole(given.output, save)
    print(f"wrote {given.output}")
    return 0
