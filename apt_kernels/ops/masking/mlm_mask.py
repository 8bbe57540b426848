"""BERT's masking of tokens, from random numbers that depend on nothing but their key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from ... import arrays, checks, dispatch, reference

if TYPE_CHECKING:
    from numpy import ndarray

KERNEL = "mlm_mask_fwd"
dispatch.define(
    "mlm_mask_fwd(Tensor input_ids, Tensor? attention_mask, Tensor? special_tokens_mask, "
    "Tensor? sample_ids, Tensor? word_ids, int[] special_runs, int mask_token_id, "
    "int word_count, int chosen_below, int mask_below, int random_below, SymInt seed_low, "
    "SymInt seed_high, SymInt step, bool at_least_one) -> (Tensor, Tensor, Tensor)"
)
dispatch.register("mlm_mask", KERNEL)

ROUNDING = 1e-9  # 0.7 + 0.2 + 0.1 need not be 1
_WORD = 2**32  # how many values a word of Philox has
_INT32 = 2**31
_MASK_DTYPES = ("bool", "uint8", "int8", "int32", "int64")  # the kernels take them as they are


@overload
def mlm_mask(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = ...,
    mask_token_prob: float = ...,
    random_token_prob: float = ...,
    special_token_ids: Sequence[int] = ...,
    special_tokens_mask: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    seed: int,
    step: int = ...,
    sample_ids: Tensor | None = ...,
    word_ids: Tensor | None = ...,
    at_least_one: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def mlm_mask(
    input_ids: ndarray,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = ...,
    mask_token_prob: float = ...,
    random_token_prob: float = ...,
    special_token_ids: Sequence[int] = ...,
    special_tokens_mask: ndarray | None = ...,
    attention_mask: ndarray | None = ...,
    seed: int,
    step: int = ...,
    sample_ids: ndarray | None = ...,
    word_ids: ndarray | None = ...,
    at_least_one: bool = ...,
    backend: str | None = ...,
) -> tuple[ndarray, ndarray, ndarray]: ...
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
    """Masked ids, labels and the chosen positions of BERT's 80/10/10 masking, in one pass.

    Slot t of a sample draws the words w0, w1, w2 of Philox4x32-10 of (seed, step, sample, t). A
    slot is chosen if w0 < mask_prob * 2^32. A chosen slot becomes the mask token if w1 <
    mask_token_prob * 2^32, a random word if w1 is below the sum of both probabilities, and else it
    stays. So the result is the same to the bit on every backend. It depends neither on the batch
    that a sample is in nor on the process that masks it. A slot costs 10 rounds of Philox, one read
    of its id and one write of the results. Sources: Devlin 2018, Salmon 2011.

    Args:
        input_ids: `(B, T)` int64 or int32; not modified. NumPy arrays, here and below, give arrays.
        mask_token_id: the id that masked slots get; it is special.
        vocab_size: random words are below it.
        mask_prob: probability of a slot (of a word, with `word_ids`) to be chosen.
        mask_token_prob: probability of a chosen slot to become the mask token.
        random_token_prob: probability of a chosen slot to become a random word.
        special_token_ids: ids that are neither chosen nor drawn as random words.
        special_tokens_mask: `(B, T)`, 1 at slots that are not chosen.
        attention_mask: `(B, T)`, 0 at slots that are not chosen, whatever ids they hold.
        seed: an integer, taken modulo 2^64.
        step: an integer in [0, 2^32), such as the epoch; each step draws anew.
        sample_ids: `(B,)` integers, the number of each sample; None means its row in the batch.
        word_ids: `(B, T)` integers: neighbours with the same number are one word, which is chosen
            as a whole. Slots with a number below 0 are not chosen.
        at_least_one: True chooses, in a row without a chosen slot, the slot (the word) with the
            smallest draw.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(masked_ids, labels, mask_positions)`, `(B, T)` each. Ids and labels have the dtype of
        `input_ids`; labels are -100 where no slot was chosen; positions are bool.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    given: dict[str, Any] = {
        "input_ids": input_ids,
        "special_tokens_mask": special_tokens_mask,
        "attention_mask": attention_mask,
        "sample_ids": sample_ids,
        "word_ids": word_ids,
    }
    as_arrays = arrays.is_array(input_ids)
    _check_tensors(**{k: arrays.described(k, v) for k, v in given.items()} if as_arrays else given)
    special_token_ids = _listed(special_token_ids)
    mask_token_id, vocab_size = arrays.plain(mask_token_id), arrays.plain(vocab_size)
    seed, step = arrays.plain(seed), arrays.plain(step)
    _check_numbers(mask_token_id, vocab_size, special_token_ids, seed, step, at_least_one)
    special_runs, word_count = _special_runs((*special_token_ids, mask_token_id), vocab_size)
    _check_probabilities(mask_prob, mask_token_prob, random_token_prob, word_count)
    device = input_ids.device if isinstance(input_ids, Tensor) else torch.device("cpu")
    backend = dispatch.choose("mlm_mask", device, backend)
    if backend == "reference":
        tensors = {k: arrays.copied(v) for k, v in given.items()} if as_arrays else given
        results: Any = reference.mlm_mask(
            **tensors,
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
        return _as_arrays(*results) if as_arrays else results
    of_arrays = as_arrays and backend == "native"
    if as_arrays and not of_arrays:
        given = {k: arrays.copied(v) for k, v in given.items()}
    call = MLMMaskCall(
        **_kernel_tensors(**given),
        special_runs=special_runs,
        mask_token_id=mask_token_id,
        word_count=word_count,
        chosen_below=round(mask_prob * _WORD),
        mask_below=round(mask_token_prob * _WORD),
        random_below=round((mask_token_prob + random_token_prob) * _WORD),
        seed_low=seed % _WORD,
        seed_high=seed // _WORD % _WORD,
        step=step,
        at_least_one=at_least_one,
    )
    if of_arrays:
        return dispatch.array_kernel(KERNEL)(*call)
    results = dispatch.kernel(KERNEL, backend)(*call)
    return _as_arrays(*results) if as_arrays else results


def _as_arrays(
    masked_ids: Tensor, labels: Tensor, mask_positions: Tensor
) -> tuple[ndarray, ndarray, ndarray]:
    return masked_ids.numpy(), labels.numpy(), mask_positions.numpy()


def _check_tensors(
    *,
    input_ids: Tensor,
    special_tokens_mask: Tensor | None,
    attention_mask: Tensor | None,
    sample_ids: Tensor | None,
    word_ids: Tensor | None,
) -> None:
    checks.tensor("input_ids", input_ids, (torch.int64, torch.int32))
    checks.dims("input_ids", input_ids, 2)
    B, T = input_ids.shape
    if T >= _INT32:
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


def _listed(special_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids as a tuple, since an iterator can be read only once."""
    checks.iterable("special_token_ids", special_token_ids, "integers")
    return tuple(map(arrays.plain, special_token_ids))


def _check_numbers(
    mask_token_id: int,
    vocab_size: int,
    special_token_ids: tuple[int, ...],
    seed: int,
    step: int,
    at_least_one: bool,
) -> None:
    checks.flag("at_least_one", at_least_one)
    checks.integer("mask_token_id", mask_token_id, 0, _INT32)
    checks.integer("vocab_size", vocab_size, 1, _INT32)
    checks.integer("seed", seed)
    checks.integer("step", step, 0, _WORD)
    for i in special_token_ids:
        checks.integer("special_token_ids", i)


def _check_probabilities(
    mask_prob: float, mask_token_prob: float, random_token_prob: float, word_count: int
) -> None:
    checks.between("mask_prob", mask_prob, 0, 1)
    checks.between("mask_token_prob", mask_token_prob, 0, 1)
    checks.between("random_token_prob", random_token_prob, 0, 1)
    if mask_token_prob + random_token_prob > 1 + ROUNDING:
        raise ValueError(
            "random_token_prob: expected at most 1 together with mask_token_prob, got "
            f"{mask_token_prob} + {random_token_prob}"
        )
    if word_count < 1 and random_token_prob > 0:
        raise ValueError(
            "random_token_prob: expected 0, as all ids below vocab_size are special, "
            f"got {random_token_prob}"
        )


def _special_runs(special_ids: Sequence[int], vocab_size: int) -> tuple[list[int], int]:
    """Runs [first, count, first, count, ...] of the special ids, and how many ids are ordinary.

    Special ids beyond the vocabulary, such as those of added tokens, are not chosen either.
    """
    # Ids of 32 bits: kernels take the runs so, and no embedding has more rows.
    special = sorted({i for i in special_ids if 0 <= i < 2**31})
    runs: list[int] = []
    for i in special:
        if runs and i == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [i, 1]
    return runs, vocab_size - sum(i < vocab_size for i in special)


def _kernel_tensors(
    *,
    input_ids: Tensor | ndarray,
    special_tokens_mask: Tensor | ndarray | None,
    attention_mask: Tensor | ndarray | None,
    sample_ids: Tensor | ndarray | None,
    word_ids: Tensor | ndarray | None,
) -> dict[str, Any]:
    """The tensors, or the arrays, as the kernels take them: contiguous, numbers as int64."""

    def mask(value):
        if value is None or str(value.dtype).removeprefix("torch.") in _MASK_DTYPES:
            return arrays.contiguous(value)
        return arrays.contiguous(value != 0)

    return {
        "input_ids": arrays.contiguous(input_ids),
        "attention_mask": mask(attention_mask),
        "special_tokens_mask": mask(special_tokens_mask),
        "sample_ids": arrays.contiguous_int64(sample_ids),
        "word_ids": arrays.contiguous_int64(word_ids),
    }


class MLMMaskCall(NamedTuple):
    """The arguments of the kernel: probabilities as words of Philox to be below, a seed in two."""

    input_ids: Tensor
    attention_mask: Tensor | None
    special_tokens_mask: Tensor | None
    sample_ids: Tensor | None
    word_ids: Tensor | None
    special_runs: list[int]
    mask_token_id: int
    word_count: int
    chosen_below: int
    mask_below: int
    random_below: int
    seed_low: int
    seed_high: int
    step: int
    at_least_one: bool


@dispatch.fake(KERNEL)
def _(*fields):
    input_ids = MLMMaskCall(*fields).input_ids
    ids = input_ids.new_empty(input_ids.shape)
    return ids, torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
