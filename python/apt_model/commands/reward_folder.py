"""The folder of a trained reward model: written, and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.preferences import PairTokenizer
from ..rl import RewardModel
from ..training.options import device_of, evaluating

HEAD, SETTINGS = "value_head.pt", "reward_model.json"


def save_reward_model(
    model: RewardModel, tokenizer: Any, text: Any, head_layers: int, folder: Path
) -> None:
    """Writes base model, tokenizer, head, and how texts become tokens, for `load_text_reward`."""
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.value_head.state_dict(), folder / HEAD)
    settings = {
        "num_layers": head_layers,
        "use_pooling": model.use_pooling,
        "max_length": text.max_length,
        "max_prompt_length": text.max_prompt_length,
        "chat_template": text.chat_template,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2))


def load_text_reward(
    folder: Path, device: torch.device | str, batch_size: int = 16
) -> Callable[..., list[float]]:
    """Returns the reward of texts by a trained model: a function of prompts and responses.

    The function also takes whether each response ended by itself (None: all did): the end token
    belongs to what was written only then.

    Args:
        folder: what the command has made.
        device: where the model is to be.
        batch_size: texts at once.
    """
    from transformers import AutoModel, AutoTokenizer

    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: train-reward-model makes such one")
    settings = json.loads((folder / SETTINGS).read_text())
    base = AutoModel.from_pretrained(folder)
    layers, pooling = settings.pop("num_layers"), settings.pop("use_pooling")
    model = RewardModel(base, base.config.hidden_size, layers, use_pooling=pooling)
    model.value_head.load_state_dict(torch.load(folder / HEAD, weights_only=True))
    model.to(device).requires_grad_(False)
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(folder), **settings)

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
                rewards += model.get_rewards(ids.to(at), mask.to(at)).squeeze(1).tolist()
        return rewards

    return reward
