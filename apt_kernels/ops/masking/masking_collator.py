"""A drop-in for Hugging Face's DataCollatorForLanguageModeling, on top of mlm_mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import checks
from .mlm_mask import ROUNDING, mlm_mask
from .tokenizer_ids import never_words, spaced_ids, vocabulary_size

IGNORED = -100
FAST_TOKENIZER_WARNING = "Asking-to-pad-a-fast-tokenizer"


@dataclass
class MaskingCollator:
    """Pads examples to a batch and masks it. It is called as DataCollatorForLanguageModeling is.

    With a `seed`, a mask depends on the seed, the step and the sample only: not on the batch the
    sample is in, its order, its padding, or the number of DataLoader workers and ranks. The step is
    0 until `set_step(epoch)` gives every epoch other masks, in workers too. Without a seed every
    call draws anew. The number of a sample is what its key `sample_key` holds, else a hash of its
    ids.

    Nothing that is passed in is modified. The collator differs from Hugging Face's in four points.
    Special ids and padding are never chosen. Special ids and ids of no token are never drawn as
    random words. Tokens that carry their space (byte-level BPE, SentencePiece) begin a word. Whole
    words are masked 80/10/10 as asked, not always by the mask token. The random numbers are others.

    Args:
        tokenizer: an object with `pad`, `mask_token_id`, `all_special_ids` and a length;
            transformers need not be installed.
        mlm: False masks nothing: the labels are the ids, -100 at padding.
        whole_word_mask: examples bring `word_ids` (None or below 0 for special tokens) or the
            tokenizer's `offset_mapping`.
        mlm_probability: probability of a token (or word) to be chosen.
        mask_replace_prob: probability of a chosen token to become the mask token.
        random_replace_prob: probability of a chosen token to become a random word.
        pad_to_multiple_of: the length of a batch is padded to a multiple of this number.
        return_tensors: "pt" or "np".
        seed: an integer; None draws other masks in every call, from PyTorch's generator.
        at_least_one: True leaves no sequence without a chosen token.
        sample_key: the key under which an example holds its number; the batch does not get it.

    Raises:
        ValueError, TypeError: a wrong argument, or a tokenizer without a mask token.
    """

    tokenizer: Any
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float | None = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None
    at_least_one: bool = False
    sample_key: str = "sample_id"

    def __post_init__(self) -> None:
        if self.mlm and self.tokenizer.mask_token_id is None:
            raise ValueError(
                "tokenizer: expected a tokenizer with a mask token, or mlm=False, got "
                "mask_token_id None"
            )
        if self.mlm:
            checks.between("mlm_probability", self.mlm_probability, 0, 1)
        elif self.whole_word_mask:
            raise ValueError("whole_word_mask: expected False, as mlm is False, got True")
        checks.between("mask_replace_prob", self.mask_replace_prob, 0, 1)
        checks.between("random_replace_prob", self.random_replace_prob, 0, 1)
        checks.choice("return_tensors", self.return_tensors, ("pt", "np"))
        if self.mask_replace_prob + self.random_replace_prob > 1 + ROUNDING:
            raise ValueError(
                "random_replace_prob: expected at most 1 together with mask_replace_prob, got "
                f"{self.mask_replace_prob} + {self.random_replace_prob}"
            )
        if self.seed is not None:
            checks.integer("seed", self.seed)
        self._special = never_words(self.tokenizer)
        self._vocabulary = vocabulary_size(self.tokenizer)
        self._spaced = spaced_ids(self.tokenizer) if self.whole_word_mask else None
        # in shared memory: workers that live longer than an epoch see it change
        self._step = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_step(self, step: int) -> None:
        """Draws the masks of this step from now on: an integer in [0, 2^32), such as the epoch."""
        checks.integer("step", step, 0, 2**32)
        self._step.fill_(step)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """The batch: `input_ids`, `labels`, and whatever else the examples hold.

        Args:
            features: dicts as tokenizers give them, or sequences of ids.
            return_tensors: "pt" or "np" instead of the collator's own.

        Returns:
            A dict (or `BatchEncoding`) of tensors or arrays, `(B, T)` each.
        """
        kind = self.return_tensors if return_tensors is None else return_tensors
        checks.choice("return_tensors", kind, ("pt", "np"))
        mappings = isinstance(features[0], Mapping)
        examples = [dict(f) if mappings else {"input_ids": f} for f in features]
        keys = (self.sample_key, "word_ids", "offset_mapping")
        own = {key: [e.pop(key, None) for e in examples] for key in keys}
        lengths = np.array([len(e["input_ids"]) for e in examples])
        words = None
        if self.whole_word_mask:
            words = [self._words(e, own, i) for i, e in enumerate(examples)]
        batch = self._padded(examples, lengths, kind)
        special = batch.pop("special_tokens_mask", None)
        ids = batch["input_ids"]
        if self.mlm:
            attention = batch.get("attention_mask")
            masked, labels = self._mask(
                _array(ids),
                _array(attention),
                _array(special),
                words,
                lengths,
                own[self.sample_key],
            )
        else:
            masked, labels = _array(ids).copy(), _array(ids).copy()
            labels[labels == self.tokenizer.pad_token_id] = IGNORED
        as_kind = torch.from_numpy if kind == "pt" else np.asarray
        batch["input_ids"], batch["labels"] = as_kind(masked), as_kind(labels)
        if not mappings:
            batch.pop("attention_mask", None)
            batch.pop("token_type_ids", None)
        return batch

    def _padded(self, examples: list[dict], lengths: np.ndarray, kind: str) -> Any:
        multiple = self.pad_to_multiple_of or 1
        uneven = bool((lengths != lengths[0]).any()) or lengths[0] % multiple != 0
        warnings = getattr(self.tokenizer, "deprecation_warnings", {})
        before = warnings.get(FAST_TOKENIZER_WARNING, False)
        warnings[FAST_TOKENIZER_WARNING] = True  # padding is what a collator is for
        try:
            return self.tokenizer.pad(
                examples,
                padding="longest" if uneven else "do_not_pad",
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=kind,
            )
        finally:
            warnings[FAST_TOKENIZER_WARNING] = before

    def _words(self, example: dict, own: dict[str, list], i: int) -> np.ndarray:
        """The number of the word of each token, -1 for special tokens."""
        given, offsets = own["word_ids"][i], own["offset_mapping"][i]
        starts = self._starts(example["input_ids"])
        if given is not None:
            numbers = np.array([-1 if w is None else int(w) for w in given], np.int64)
            # Of a tokenizer that splits nothing beforehand the whole text is one word
            parts = np.cumsum(np.zeros(len(numbers)) if starts is None else starts)
            changes = np.r_[True, (np.diff(numbers) != 0) | (np.diff(parts) != 0)][: len(numbers)]
            return np.where(numbers < 0, -1, np.cumsum(changes))
        if offsets is None:
            raise ValueError(
                "whole_word_mask: expected examples with word_ids or offset_mapping (tokenizers "
                f"return offsets with return_offsets_mapping=True), got {sorted(example)}"
            )
        begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        special = example.get("special_tokens_mask")
        if special is None:
            special = np.isin(example["input_ids"], self._special)
        special = np.asarray(special).astype(bool)
        touches = np.r_[False, (begins[1:] == ends[:-1]) & ~special[:-1]]
        if starts is not None:
            touches &= ~starts
        return np.where(special, -1, np.cumsum(~special & ~touches))

    def _starts(self, ids: Sequence[int]) -> np.ndarray | None:
        """Which tokens carry the space before a word; None where none of the vocabulary does."""
        if self._spaced is None:
            return None
        return np.isin(np.asarray(ids), self._spaced)

    def _mask(self, ids, attention, special, words, lengths, samples):
        """Masked ids and labels. Slot 0 of a sequence is its first token, also after padding."""
        B, T = ids.shape
        shift = np.zeros((B, 1), np.int64)
        if self.tokenizer.padding_side == "left":
            shift = (T - lengths)[:, None]
        places = (np.arange(T) + shift) % T
        moved = bool(shift.any())
        if moved:
            ids, attention, special = (
                None if a is None else np.take_along_axis(a, places, 1)
                for a in (ids, attention, special)
            )
        if words is not None:
            padded = np.full((B, T), -1)
            for row, numbers in zip(padded, words, strict=True):
                row[: len(numbers)] = numbers
            words = padded
        assert self.mlm_probability is not None  # only a collator without masking may have None
        masked, labels, _ = mlm_mask(
            ids,
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=self._vocabulary,
            mask_prob=float(self.mlm_probability),
            mask_token_prob=float(self.mask_replace_prob),
            random_token_prob=float(self.random_replace_prob),
            special_token_ids=self._special,
            special_tokens_mask=special,
            attention_mask=attention,
            seed=int(torch.randint(2**62, ())) if self.seed is None else self.seed,
            step=int(self._step),
            sample_ids=_sample_numbers(samples, ids, lengths),
            word_ids=words,
            at_least_one=self.at_least_one,
        )
        if moved:
            places = (np.arange(T) - shift) % T
            masked, labels = (np.take_along_axis(a, places, 1) for a in (masked, labels))
        return masked, labels


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers whose results look random (splitmix64, Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sample_numbers(samples: list, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers that examples bring, or a 64-bit hash of the ids without padding."""
    given = [sample is not None for sample in samples]
    if all(given):
        return np.array([int(sample) for sample in samples], np.int64)
    if any(given):
        raise ValueError(
            f"sample_key: expected every example to hold it, or none, got {sum(given)} of "
            f"{len(given)}"
        )
    slots = np.arange(ids.shape[1])
    factors = _mixed(slots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    tokens = np.where(slots < lengths[:, None], ids + 1, 0).astype(np.uint64)
    hashes = _mixed((tokens * factors).sum(1, dtype=np.uint64) + lengths.astype(np.uint64))
    return hashes.view(np.int64)
