"""BERT's masking of tokens, from random numbers that depend on nothing but their key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import arrays, checks, dispatch, reference

if TYPE_CHECKING:
    from numpy import ndarray

dispatch.register("mlm_mask", "mlm_mask_fwd")

WORD = 2**32  # how many values a word of Philox has
INT32 = 2**31
ROUNDING = 1e-9  # 0.7 + 0.2 + 0.1 need not be 1
MASK_DTYPES = ("bool", "uint8", "int8", "int32", "int64")  # the kernels take them as they are


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
    _check_tensors(**{k: arrays.described(k, v) for k, v in named.items()} if as_arrays else named)
    _check_numbers(mask_token_id, vocab_size, special_token_ids, seed, step)
    runs, words = _special_runs((*special_token_ids, mask_token_id), vocab_size)
    _check_probabilities(mask_prob, mask_token_prob, random_token_prob, words)
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
        bool(at_least_one),
    )
    if as_arrays and backend == "native":
        return dispatch.array_kernel("mlm_mask_fwd")(*_normalised(**named), *numbers)
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
        results = dispatch.kernel("mlm_mask_fwd", backend)(*_normalised(**named), *numbers)
    return tuple(t.numpy() for t in results) if as_arrays else results


def _special_runs(special_ids: Sequence[int], vocab_size: int) -> tuple[list[int], int]:
    """Runs [first, count, first, count, ...] of the special ids, and how many ids are ordinary."""
    special = sorted({i for i in special_ids if 0 <= i < vocab_size})
    runs: list[int] = []
    for i in special:
        if runs and i == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [i, 1]
    return runs, vocab_size - len(special)


def _normalised(input_ids, special_tokens_mask, attention_mask, sample_ids, word_ids):
    def mask(value):
        if value is None or str(value.dtype).removeprefix("torch.") in MASK_DTYPES:
            return arrays.contiguous(value)
        return arrays.contiguous(value != 0)

    return (
        arrays.contiguous(input_ids),
        mask(attention_mask),
        mask(special_tokens_mask),
        arrays.contiguous_int64(sample_ids),
        arrays.contiguous_int64(word_ids),
    )


def _check_tensors(input_ids, special_tokens_mask, attention_mask, sample_ids, word_ids):
    checks.tensor("input_ids", input_ids, (torch.int64, torch.int32))
    checks.dims("input_ids", input_ids, 2)
    B, T = input_ids.shape
    if T >= INT32:
        raise ValueError(f"input_ids: expected fewer than 2^31 slots a row, got {T}")
    for name, mask in (
        ("special_tokens_mask", special_tokens_mask),
        ("attention_mask", attention_mask),
    ):
        if mask is not None:
            checks.tensor(name, mask, (torch.bool, *checks.INTEGERS, *checks.FLOATS))
            checks.shape(name, mask, (B, T), "one entry a slot")
            checks.same_device(name, mask, "input_ids", input_ids)
    for name, ids, shape, meaning in (
        ("sample_ids", sample_ids, (B,), "one number a row"),
        ("word_ids", word_ids, (B, T), "one number a slot"),
    ):
        if ids is not None:
            checks.tensor(name, ids, checks.INTEGERS)
            checks.shape(name, ids, shape, meaning)
            checks.same_device(name, ids, "input_ids", input_ids)


def _check_numbers(mask_token_id, vocab_size, special_token_ids, seed, step):
    checks.integer("mask_token_id", mask_token_id, 0, INT32)
    checks.integer("vocab_size", vocab_size, 1, INT32)
    checks.integer("seed", seed)
    checks.integer("step", step, 0, WORD)
    for i in special_token_ids:
        checks.integer("special_token_ids", i)


def _check_probabilities(mask_prob, mask_token_prob, random_token_prob, words):
    checks.between("mask_prob", mask_prob, 0, 1)
    checks.between("mask_token_prob", mask_token_prob, 0, 1)
    checks.between("random_token_prob", random_token_prob, 0, 1)
    if mask_token_prob + random_token_prob > 1 + ROUNDING:
        raise ValueError(
            "random_token_prob: expected at most 1 together with mask_token_prob, got "
            f"{mask_token_prob} + {random_token_prob}"
        )
    if words < 1 and random_token_prob > 0:
        raise ValueError(
            "random_token_prob: expected 0, as all ids below vocab_size are special, "
            f"got {random_token_prob}"
        )


@dispatch.fake("mlm_mask_fwd")
def _(input_ids, *options):
    ids = input_ids.new_empty(input_ids.shape)
    return ids, torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
