"""The reward that the options of a command name: functions of files, or a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.prompts import prompt_of
from ..rl.reward_files import source_file
from ..rl.reward_functions import RewardFunction, RowReward, read_functions
from .reward_folder import load_text_reward

ESCAPES = {r"\n": "\n", r"\t": "\t"}


def read_rewards(options: Any) -> list[RewardFunction]:
    """Returns the functions that `--reward` names; none where there is a reward model instead.

    Called before a model is loaded, so that a mistake in a file is told at once.
    """
    return read_functions(options.reward)


def reward_of(
    options: Any,
    functions: Sequence[RewardFunction],
    tokenizer: Any,
    prompts: Sequence[Any],
    end_token_ids: Sequence[int],
    device: torch.device | str,
) -> RowReward:
    """Returns the reward of a command.

    Args:
        options: the group of rewards.
        functions: what `read_rewards` returned.
        tokenizer: of the policy.
        prompts: of the data and of what is held out, in the order of their positions.
        end_token_ids: what may end a response.
        device: where a reward model is to be.
    """
    if options.reward_model is not None:
        functions = [_of_model(options.reward_model, device)]
    return RowReward(
        functions,
        tokenizer,
        [prompt.row for prompt in prompts],
        [prompt.place or f"row {number}" for number, prompt in enumerate(prompts)],
        weights=options.reward_weight or None,
        special_tokens=options.special_tokens,
        end_token_ids=end_token_ids,
    )


def _of_model(folder: Path, device: torch.device | str) -> RewardFunction:
    score = load_text_reward(folder, device)

    def reward_model(
        rows: list[dict[str, Any]], responses: list[str], finished: list[bool]
    ) -> list[float]:
        return score([prompt_of(row) for row in rows], responses, finished)

    return RewardFunction(reward_model, origin=str(folder))


def inputs_of(options: Any) -> dict[str, Path]:
    """Returns the files and folders that decide the rewards; a change of them is another run."""
    if options.reward_model is not None:
        return {"reward_model": options.reward_model}
    files = dict.fromkeys(filter(None, map(source_file, options.reward)))
    return {"reward" if i == 0 else f"reward_{i + 1}": file for i, file in enumerate(files)}


def stop_strings(stop: Sequence[str]) -> list[str]:
    r"""Returns texts of a command line, where \n and \t stand for the line's end and a tab."""
    for written, meant in ESCAPES.items():
        stop = [text.replace(written, meant) for text in stop]
    return list(stop)
