"""The arguments of mlm_mask: what is rejected, and how its kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import arrays, checks

WORD = 2**32  # how many values a word of Philox has
INT32 = 2**31
ROUNDING = 1e-9  # 0.7 + 0.2 + 0.1 need not be 1
MASK_DTYPES = ("bool", "uint8", "int8", "int32", "int64")  # the kernels take them as they are


def special_runs(special_ids: Sequence[int], vocab_size: int) -> tuple[list[int], int]:
    """Runs [first, count, first, count, ...] of the special ids, and how many ids are ordinary.

    Special ids beyond the vocabulary, such as those of added tokens, are not chosen either.
    """
    special = sorted({i for i in special_ids if i >= 0})
    runs: list[int] = []
    for i in special:
        if runs and i == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [i, 1]
    return runs, vocab_size - sum(i < vocab_size for i in special)


def normalised(input_ids, special_tokens_mask, attention_mask, sample_ids, word_ids):
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


def check_tensors(input_ids, special_tokens_mask, attention_mask, sample_ids, word_ids):
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


def listed(special_token_ids):
    """The ids as a tuple: what can be gone through once is gone through here."""
    checks.iterable("special_token_ids", special_token_ids, "integers")
    return tuple(map(arrays.plain, special_token_ids))


def check_numbers(mask_token_id, vocab_size, special_token_ids, seed, step, at_least_one):
    checks.flag("at_least_one", at_least_one)
    checks.integer("mask_token_id", mask_token_id, 0, INT32)
    checks.integer("vocab_size", vocab_size, 1, INT32)
    checks.integer("seed", seed)
    checks.integer("step", step, 0, WORD)
    for i in special_token_ids:
        checks.integer("special_token_ids", i)


def check_probabilities(mask_prob, mask_token_prob, random_token_prob, words):
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
