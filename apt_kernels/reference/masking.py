"""Masking for masked-language modelling, from counter-based random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF
IGNORED = -100


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Returns the four 32-bit words of Philox4x32-10 for a counter of four words and a key of two.

    Words are int64 tensors in [0, 2^32). Source: Salmon 2011, "Parallel random numbers: as easy as
    1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, by halves of the factor: int64 has only 63 bits."""
    low_product = word * (factor & 0xFFFF)
    middle = word * (factor >> 16) + (low_product >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)


def probability_threshold(probability: float) -> int:
    """The number of 32-bit words that are below the threshold: probability * 2^32, rounded."""
    return round(probability * (WORD + 1))


def mlm_mask(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = 0.15,
    mask_token_prob: float = 0.8,
    random_token_prob: float = 0.1,
    special_token_ids: Sequence[int] = (),
    special_tokens_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int,
    step: int = 0,
    sample_ids: Tensor | None = None,
    word_ids: Tensor | None = None,
    at_least_one: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns masked ids, labels and the positions chosen: BERT's 80/10/10 masking.

    Slot t of a sample draws w0..w3 = Philox4x32-10 of the counter (t, step, sample low, sample
    high) under the key (seed low, seed high). It is chosen if w0 < mask_prob * 2^32; a chosen slot
    becomes the mask token if w1 < mask_token_prob * 2^32, a random word if w1 < (mask_token_prob +
    random_token_prob) * 2^32, and else stays. The random word is number (w2 * n) >> 32 of the n
    words that are not special. So the result depends on the seed, the step, the sample and the
    position alone. Sources: Devlin 2018; Salmon 2011.

    Args:
        input_ids: `(B, T)`, int64 or int32; not modified.
        mask_token_id: the id of [MASK]; counts as special.
        vocab_size: random words are below it.
        mask_prob: the probability of a slot (or word) to be chosen.
        mask_token_prob: of a chosen slot to become the mask token.
        random_token_prob: of a chosen slot to become a random word.
        special_token_ids: ids that are never chosen and never drawn.
        special_tokens_mask: `(B, T)`, 1 marks slots that are never chosen.
        attention_mask: `(B, T)`, 0 marks slots that are never chosen.
        seed: 64 bits.
        step: 32 bits, another draw for each.
        sample_ids: `(B,)` int64, what keys a row; None: its number in the batch.
        word_ids: `(B, T)`, equal neighbours are one word, chosen as a whole by the w0 of its first
            slot; slots below 0 are never chosen.
        at_least_one: where nothing was chosen, choose the slot (or word) of the smallest w0.

    Returns:
        `(masked_ids, labels, mask_positions)`; labels are the ids at chosen slots and -100
        elsewhere; both in the dtype of `input_ids`, the positions bool.
    """
    rows, length = input_ids.shape
    device = input_ids.device
    positions = torch.arange(length, device=device).expand(rows, length)
    samples = torch.arange(rows, device=device) if sample_ids is None else sample_ids.long()
    samples = samples.unsqueeze(-1).expand(rows, length)
    counter = (positions, torch.full_like(positions, step), samples & WORD, samples >> 32 & WORD)
    w0, w1, w2, _ = philox4x32(counter, (seed & WORD, seed >> 32 & WORD))

    special = sorted({i for i in (*special_token_ids, mask_token_id) if 0 <= i < vocab_size})
    special_ids = torch.tensor(special, dtype=torch.int64, device=device)
    eligible = ~torch.isin(input_ids.long(), special_ids)
    if attention_mask is not None:
        eligible &= attention_mask.bool()
    if special_tokens_mask is not None:
        eligible &= ~special_tokens_mask.bool()
    starts = positions
    if word_ids is not None:
        eligible &= word_ids >= 0
        new_word = torch.ones_like(eligible)
        new_word[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
        starts = torch.where(new_word, positions, 0).cummax(-1).values
        w0 = w0.gather(-1, starts)

    chosen = eligible & (w0 < probability_threshold(mask_prob))
    if at_least_one and length:
        never = torch.iinfo(torch.int64).max
        order = torch.where(eligible, (w0 << 31) + starts, never)
        first = order.min(-1, keepdim=True).values
        chosen = chosen | (eligible & (order == first))  # where any is chosen, the smallest is

    words = _random_words(w2, vocab_size, special_ids)
    mask_below = probability_threshold(mask_token_prob)
    random_below = probability_threshold(mask_token_prob + random_token_prob)
    replaced = torch.where(w1 < random_below, words, input_ids.long())
    replaced = torch.where(w1 < mask_below, mask_token_id, replaced)
    masked_ids = torch.where(chosen, replaced.to(input_ids.dtype), input_ids)
    labels = torch.where(chosen, input_ids, IGNORED)
    return masked_ids, labels, chosen


def _random_words(word: Tensor, vocab_size: int, special_ids: Tensor) -> Tensor:
    """The word * n >> 32 th of the n ids that are not special."""
    allowed = word * (vocab_size - len(special_ids)) >> 32
    shifts = special_ids - torch.arange(len(special_ids), device=word.device)
    return allowed + torch.searchsorted(shifts, allowed, right=True)
