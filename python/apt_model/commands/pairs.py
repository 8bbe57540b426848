"""Preference pairs for the commands that train on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..data.lengths import LengthLimit
from ..data.order import ShuffledBatches, of_rows
from ..data.preferences import PairTokenizer, PreferencePair, collate, load_pairs
from .evaluation import mean_over_rows
from .job import shares
from .texts import counted, reading

Batch = Mapping[str, Any]


def load_all_pairs(
    options: Any, tokenizer: Any, limit: LengthLimit
) -> tuple[list[PreferencePair], list[PreferencePair], dict[str, int]]:
    """Returns the pairs to train on, the held-out ones, and what is counted of both.

    Args:
        options: of a command.
        tokenizer: of the model.
        limit: tokens of prompt and answer.
    """
    text, run = options.text, options.run
    tokenize = PairTokenizer(
        tokenizer,
        limit,
        text.max_prompt_length,
        text.chat_template,
        text.truncate,
        all_turns=text.answer_turns == "all",
    )
    counts: Counter[str] = Counter()
    of_held_out: Counter[str] = Counter()
    pairs = load_pairs(run.data, tokenize, **reading(options, counts))
    held_out = []
    if run.eval_data:
        held_out = load_pairs(run.eval_data, tokenize, **reading(options, of_held_out, True))
    numbers = {"pairs": len(pairs), "held_out_pairs": len(held_out)}
    return pairs, held_out, {**numbers, **counted(counts, of_held_out)}


def batches_of_pairs(
    options: Any, pairs: Sequence[PreferencePair], drop: Sequence[str] = ()
) -> ShuffledBatches:
    """Returns the batches of a run on pairs, without what in a batch is called as in `drop`."""
    training = options.training
    make = of_rows(pairs, lambda part: without(drop, collate(part)))
    return ShuffledBatches(
        len(pairs), training.batch_size, training.seed, make, share=shares(training)
    )


def evaluate_pairs(
    trainer: Any, pairs: Sequence[PreferencePair], batch_size: int, drop: Sequence[str] = ()
) -> dict[str, float]:
    """Returns the mean over pairs of what `eval_step` returns; nothing for no pairs.

    Args:
        trainer: has an `eval_step` of pairs.
        pairs: the pairs to measure.
        batch_size: how many at once.
        drop: names of what in a batch that step does not take.
    """

    def measure(part: list[PreferencePair]) -> dict[str, float]:
        return trainer.eval_step(**without(drop, collate(part)))

    pairs = sorted(pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))  # less padding
    return mean_over_rows(pairs, batch_size, measure)


def measure_of(
    trainer: Any, held_out: Sequence[PreferencePair], options: Any, drop: Sequence[str] = ()
) -> Callable[[], dict[str, float]] | None:
    """Returns what measures the held-out pairs; None where there are none."""
    if not held_out:
        return None
    return partial(evaluate_pairs, trainer, held_out, options.training.batch_size, drop)


def without(names: Sequence[str], batch: Batch) -> dict[str, Any]:
    """Returns a batch without what is called so."""
    return {name: value for name, value in batch.items() if name not in names}
