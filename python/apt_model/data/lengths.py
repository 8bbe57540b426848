"""How long texts may be: the positions of a model, and what is cut where a row is longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
# Their first positions belong to padding
PADDED_POSITIONS = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "esm", "mpnet",
    "data2vec-text", "ibert", "roberta-prelayernorm", "xmod", "mega", "led-encoder", "layoutlmv3",
    "luke", "mluke", "lilt",
)  # fmt: skip
COMPUTED = ("rope", "rotary", "alibi")  # names of the options of such positions


class Positions(NamedTuple):
    """How many tokens a model takes.

    Attributes:
        count: the largest number of tokens, without padding.
        is_table: the positions are a table of embeddings: more tokens fail; False: they are
            computed, and beyond `count` the model was not trained.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls here
    is_table: bool


def positions_of(config: Any) -> Positions | None:
    """Returns how many tokens the model of a configuration takes; None where nothing limits it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = next((c for name in POSITIONS if isinstance(c := getattr(text, name, None), int)), None)
    if count is None or count < 1:
        return None
    kind = getattr(text, "position_embedding_type", None)
    if kind is None:
        given = [name for name, value in vars(text).items() if value]
        computed = any(part in name for name in given for part in COMPUTED)
    else:
        computed = kind != "absolute"
    if getattr(text, "position_biased_input", True) is False:
        computed = True
    if getattr(text, "model_type", "") in PADDED_POSITIONS and not computed:
        padding = getattr(text, "pad_token_id", None)
        count -= (0 if padding is None else padding) + 1
    return Positions(count, not computed)


def check_max_length(
    model_config: Any, tokenizer: Any, max_length: int | None, new_tokens: int = 0
) -> None:
    """Checks `--max-length` against a model and a tokenizer, before anything is read.

    Args:
        model_config: configuration of the model, as transformers has it.
        tokenizer: of Hugging Face; None: its special tokens need no room.
        max_length: largest number of tokens; None: it was not given.
        new_tokens: how many tokens are sampled beyond `max_length`.

    Raises:
        ValueError: names `--max-length` and the limit.
    """
    if max_length is None:
        return
    positions = positions_of(model_config)
    if positions is not None and max_length + new_tokens > positions.count:
        sampled = f" with {new_tokens} new tokens" if new_tokens else ""
        raise ValueError(
            f"--max-length {max_length}{sampled} is beyond the {positions.count} positions of the "
            f"model ({getattr(model_config, 'model_type', 'unknown')}): give at most "
            f"--max-length {positions.count - new_tokens}"
        )
    special = 0 if tokenizer is None else special_count(tokenizer)
    if max_length <= special:
        raise ValueError(
            f"--max-length {max_length} leaves no room for text beside the {special} special "
            f"tokens of a sequence: give at least --max-length {special + 1}"
        )


def resolved_max_length(
    model_config: Any, tokenizer: Any, max_length: int | None, default: int
) -> int:
    """Returns `--max-length`, checked; where it was not given, the default or the model's limit.

    Only a table of positions limits the default: `check_fits` then names rows that are longer.

    Raises:
        ValueError: as `check_max_length`.
    """
    check_max_length(model_config, tokenizer, max_length)
    if max_length is not None:
        return max_length
    positions = positions_of(model_config)
    if positions is None or not positions.is_table:
        return default
    return min(default, positions.count)


class LengthLimit(NamedTuple):
    """A largest number of tokens.

    Attributes:
        tokens: the number.
        asked: it was given as `--max-length`, or is the default; False: the model's positions are
            fewer than the default, and a longer row is an error, not cut unasked.
    """

    tokens: int
    asked: bool = True

    @classmethod
    def of(
        cls, model_config: Any, tokenizer: Any, max_length: int | None, default: int
    ) -> LengthLimit:
        """Returns the limit of `resolved_max_length`."""
        tokens = resolved_max_length(model_config, tokenizer, max_length, default)
        return cls(tokens, max_length is not None or tokens == default)

    def check(self, tokens: int) -> None:
        """Raises ValueError for a longer row where the limit was not asked for."""
        if tokens > self.tokens and not self.asked:
            raise ValueError(
                f"a row has {tokens} tokens, but the model has {self.tokens} positions: give "
                f"--max-length {self.tokens} (or fewer) to cut rows to it"
            )


def special_count(tokenizer: Any) -> int:
    """Returns how many tokens the tokenizer adds to one text."""
    return tokenizer.num_special_tokens_to_add(pair=False)


def cut_prompt(length: int, head: int, tail: int, most: int, side: str) -> list[int]:
    """Returns the numbers of the tokens that are left of a prompt.

    Args:
        length: tokens of the prompt.
        head: how many first tokens are kept: BOS, the header of a chat.
        tail: how many last tokens are kept: the header of the answer.
        most: how many tokens may be left.
        side: "prompt-start" or "prompt-end", which is cut between head and tail.
    """
    if length <= most:
        return list(range(length))
    head = min(head, length)
    tail = min(tail, length - head)
    body = list(range(head, length - tail))
    room = max(most - head - tail, 0)
    kept = body[len(body) - room :] if side == "prompt-start" else body[:room]
    return [*range(head), *kept, *range(length - tail, length)]


def windows(length: int, room: int, words: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Returns `(begin, end)` of windows of nearly equal lengths that cover a text.

    Args:
        length: tokens of the text.
        room: tokens of a window, at most.
        words: of each token the number of its word: a word is not cut unless it fills a window.
    """
    if length == 0:
        return []
    made, begin = [], 0
    while begin < length:
        parts = -(-(length - begin) // room)
        end = begin + -(-(length - begin) // parts)
        if words is not None and end < length:
            whole = end
            while whole > begin and words[whole] == words[whole - 1]:
                whole -= 1
            end = whole if whole > begin else end
        made.append((begin, end))
        begin = end
    return made
