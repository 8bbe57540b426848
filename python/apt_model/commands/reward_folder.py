"""The folder of a trained reward model: written, and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.preferences import PairTokenizer
from ..rl import RewardModel
from ..rl.reward_output import rewards_of
from ..scoring.devices import device_of, evaluating
from ..scoring.loading import is_adapter, load_config, load_model, load_tokenizer
from ..scoring.model_access import base_model
from ..scoring.saving import save_model
from ..scoring.sequence_scores import SequenceScores, reads_left_to_right
from .job import pretrained
from .models import trained_part, without_pooler

CLASSIFIER = "AutoModelForSequenceClassification"
HEAD, SETTINGS = "value_head.pt", "reward_model.json"


def make_reward_model(options: Any, tokenizer: Any) -> Any:
    """Returns the model that `train-reward-model` trains, of its options.

    It is a classifier of transformers with one label, unless the options ask for a pooling or a
    head that it does not have.
    """
    reward = options.reward
    if reward.pooling in ("own", "last") and reward.head_layers == 1:
        model = pretrained(options, CLASSIFIER, num_labels=1)
        if reward.pooling == "own" or reads_left_to_right(base_model(model)):
            return _classifier(options, model, tokenizer)
    base = without_pooler(pretrained(options, "AutoModel"))
    base = trained_part(options, base, none_is_possible=True, wrap=False)
    pooling = "last" if reward.pooling == "own" else reward.pooling
    width = base.config.hidden_size
    return RewardModel(base, width, reward.head_layers, reward.dropout, pooling)


def _classifier(options: Any, model: Any, tokenizer: Any) -> Any:
    inner = base_model(model)
    name_padding(inner.config, tokenizer)
    made = set(getattr(inner, "made_weights", ()))
    model = trained_part(options, model, none_is_possible=True, wrap=False)
    if options.model.has_adapter:
        return model
    trunk = {id(parameter) for parameter in inner.base_model.parameters()}
    for name, parameter in inner.named_parameters():
        if id(parameter) not in trunk or name in made:  # the head, whatever else is frozen
            parameter.requires_grad_(True)
    return model


def name_padding(config: Any, tokenizer: Any) -> None:
    """Gives a classifier's configuration a padding token where it has none.

    The classifier scores the last token that is no padding, and without one no batch.
    """
    if config.pad_token_id is None:
        spare = tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id
        config.pad_token_id = next((i for i in spare if i is not None), None)


def save_reward_model(
    model: Any, tokenizer: Any, text: Any, head_layers: int, folder: Path,
    merge_adapter: bool = False,
) -> None:  # fmt: skip
    """Writes a reward model, and how texts become tokens, for `load_text_reward`.

    A classifier is written as transformers, TRL and vLLM load it; of a `RewardModel` the base model
    and its head.
    """
    settings = {
        "max_length": text.max_length,
        "max_prompt_length": text.max_prompt_length,
        "chat_template": text.chat_template,
    }
    if isinstance(model, RewardModel):
        save_model(model.base_model, folder, tokenizer, merge_adapter)
        torch.save(model.value_head.state_dict(), folder / HEAD)
        settings |= {"num_layers": head_layers, "use_pooling": model.use_pooling}
    else:
        save_model(model, folder, tokenizer, merge_adapter)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2))


def load_reward_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the reward model of a folder, and how texts become tokens.

    Args:
        folder: what the command has made, or a classifier of transformers with one label, whoever
            made it; or the adapter of such a one.

    Raises:
        ValueError: the folder is of another model.
    """
    file = folder / SETTINGS
    settings = json.loads(file.read_text()) if file.is_file() else {}
    layers, pooling = settings.pop("num_layers", None), settings.pop("use_pooling", None)
    if (folder / HEAD).is_file():
        base = load_model(folder, "AutoModel", trainable=False)
        model = RewardModel(base, base.config.hidden_size, layers, use_pooling=pooling)
        model.value_head.load_state_dict(torch.load(folder / HEAD, weights_only=True))
        return model, settings
    kind = (load_config(folder).architectures or ["no architecture"])[0]
    if not is_adapter(folder) and not kind.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds no reward model: expected a model ForSequenceClassification with one "
            f"label, which train-reward-model makes, got {kind}"
        )
    options: dict[str, Any] = {"num_labels": 1} if is_adapter(folder) else {}
    model = load_model(folder, CLASSIFIER, trainable=False, **options)
    if is_adapter(folder):  # the base model's configuration is not what the training made of it
        name_padding(base_model(model).config, load_tokenizer(folder))
    labels = base_model(model).config.num_labels
    if labels != 1:
        raise ValueError(f"{folder}: num_labels: expected 1, one number a text, got {labels}")
    return model, settings


def load_text_reward(
    folder: Path, device: torch.device | str, batch_size: int = 16
) -> Callable[..., list[float]]:
    """Returns the reward of texts by a trained model: a function of prompts and responses.

    The function also takes whether each response ended by itself (None: all did): the end token
    belongs to what was written only then.

    Args:
        folder: as `load_reward_model` takes it.
        device: where the model is to be.
        batch_size: texts at once.
    """
    model, settings = load_reward_model(folder)
    model.to(device).requires_grad_(False)
    call, tokenize = SequenceScores(model), PairTokenizer(load_tokenizer(folder), **settings)

    @torch.no_grad()
    def reward(
        prompts: Sequence[Any], responses: Sequence[str], finished: Sequence[bool] | None = None
    ) -> list[float]:
        ends = [True] * len(prompts) if finished is None else finished
        rows = [
            torch.tensor(tokenize.sequence(prompt, response, finished=end))
            for prompt, response, end in zip(prompts, responses, ends, strict=True)
        ]
        rewards: list[float] = []
        with evaluating(model):
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                ids = pad_sequence(part, batch_first=True)
                lengths = torch.tensor([len(row) for row in part]).unsqueeze(1)
                mask = (torch.arange(ids.shape[1]) < lengths).long()
                at = device_of(model)
                output = call(model, ids.to(at), mask.to(at))
                rewards += rewards_of(output, len(part)).tolist()
        return rewards

    return reward
