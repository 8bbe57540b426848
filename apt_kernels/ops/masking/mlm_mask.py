"""BERT's masking of tokens, from random numbers that depend on nothing but their key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import arrays, dispatch, reference
from .mlm_mask_arguments import (
    WORD,
    check_numbers,
    check_probabilities,
    check_tensors,
    listed,
    normalised,
    special_runs,
)

if TYPE_CHECKING:
    from numpy import ndarray

dispatch.define(
    "mlm_mask_fwd(Tensor input_ids, Tensor? attention_mask, Tensor? special_tokens_mask, "
    "Tensor? sample_ids, Tensor? word_ids, int[] special_runs, int mask_token_id, "
    "int word_count, int chosen_below, int mask_below, int random_below, SymInt seed_low, "
    "SymInt seed_high, SymInt step, bool at_least_one) -> (Tensor, Tensor, Tensor)"
)
dispatch.register("mlm_mask", "mlm_mask_fwd")


def mlm_mask(
    input_ids: Tensor | ndarray,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = 0.15,
    mask_token_prob: float = 0.8,
    random_token_prob: float = 0.1,
    special_token_ids: Sequence[int] = (),
    special_tokens_mask: Tensor | ndarray | None = None,
    attention_mask: Tensor | ndarray | None = None,
    seed: int,
    step: int = 0,
    sample_ids: Tensor | ndarray | None = None,
    word_ids: Tensor | ndarray | None = None,
    at_least_one: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor] | tuple[ndarray, ndarray, ndarray]:
    """masked_ids, labels and the positions that were chosen: 80/10/10 masking in one pass.

    Slot t of a sample draws the words w0, w1, w2 of Philox4x32-10 of (seed, step, sample, t). It is
    chosen if w0 < mask_prob * 2^32; a chosen slot becomes the mask token if w1 < mask_token_prob *
    2^32, a random word if w1 is below the sum of both probabilities, else it stays. So the result
    is the same to the bit on every backend, and depends neither on the batch that a sample is in
    nor on the process that masks it. Costs 10 rounds of Philox a slot, one read of the ids and one
    write of the results. Sources: Devlin 2018, Salmon 2011.

    Args:
        input_ids: `(B, T)` int64 or int32; not modified. NumPy arrays, here and below, give arrays.
        mask_token_id: what masked slots become; itself special.
        vocab_size: random words are below it.
        mask_prob: probability of a slot (of a word, with `word_ids`) to be chosen.
        mask_token_prob: probability of a chosen slot to become the mask token.
        random_token_prob: probability of a chosen slot to become a random word.
        special_token_ids: ids that are neither chosen nor drawn as random words.
        special_tokens_mask: `(B, T)`, 1 at slots that are not chosen.
        attention_mask: `(B, T)`, 0 at slots that are not chosen, whatever ids they hold.
        seed: an integer, taken modulo 2^64.
        step: an integer in [0, 2^32), such as the epoch: another draw for each.
        sample_ids: `(B,)` integers that key the rows; None: the number of the row in the batch.
        word_ids: `(B, T)` integers: neighbours of one number are one word, chosen as a whole;
            slots below 0 are not chosen.
        at_least_one: in a row without a chosen slot choose the one (the word) of the smallest draw.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(masked_ids, labels, mask_positions)`, `(B, T)` each: both in the dtype of the ids, labels
        -100 where nothing was chosen; the positions bool. No rows: empty.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    named = {
        "input_ids": input_ids,
        "special_tokens_mask": special_tokens_mask,
        "attention_mask": attention_mask,
        "sample_ids": sample_ids,
        "word_ids": word_ids,
    }
    as_arrays = arrays.is_array(input_ids)
    check_tensors(**{k: arrays.described(k, v) for k, v in named.items()} if as_arrays else named)
    special_token_ids = listed(special_token_ids)
    given = (mask_token_id, vocab_size, seed, step)
    mask_token_id, vocab_size, seed, step = map(arrays.plain, given)
    check_numbers(mask_token_id, vocab_size, special_token_ids, seed, step, at_least_one)
    runs, words = special_runs((*special_token_ids, mask_token_id), vocab_size)
    check_probabilities(mask_prob, mask_token_prob, random_token_prob, words)
    backend = dispatch.choose(
        "mlm_mask", torch.device("cpu") if as_arrays else input_ids.device, backend
    )
    numbers = (
        runs,
        mask_token_id,
        words,
        round(mask_prob * WORD),
        round(mask_token_prob * WORD),
        round((mask_token_prob + random_token_prob) * WORD),
        seed % WORD,
        seed // WORD % WORD,
        step,
        at_least_one,
    )
    if as_arrays and backend == "native":
        return dispatch.array_kernel("mlm_mask_fwd")(*normalised(**named), *numbers)
    if as_arrays:
        named = {k: arrays.copied(v) for k, v in named.items()}
    if backend == "reference":
        results = reference.mlm_mask(
            **named,
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            mask_prob=mask_prob,
            mask_token_prob=mask_token_prob,
            random_token_prob=random_token_prob,
            special_token_ids=special_token_ids,
            seed=seed,
            step=step,
            at_least_one=at_least_one,
        )
    else:
        results = dispatch.kernel("mlm_mask_fwd", backend)(*normalised(**named), *numbers)
    return tuple(t.numpy() for t in results) if as_arrays else results


@dispatch.fake("mlm_mask_fwd")
def _(input_ids, *options):
    ids = input_ids.new_empty(input_ids.shape)
    return ids, torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
