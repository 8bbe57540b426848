"""Hugging Face's masking collator on `mlm_mask`: the same class to users, without its surprises.

`from apt_kernels.integrations.transformers import DataCollatorForLanguageModeling`
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from ..ops.mlm_mask import mlm_mask


class DataCollatorForLanguageModeling(transformers.DataCollatorForLanguageModeling):
    """Hugging Face's collator, with the masking of `mlm_mask` in one pass.

    Arguments, padding, other keys and `mlm=False` are Hugging Face's. What differs: the ids that
    are passed in are not modified; a random word is never a special one; padding is never masked,
    also where the examples bring no special-token mask; whole words keep `mask_replace_prob` as
    Hugging Face sets it, 1. The draws are another random sequence than Hugging Face's: with `seed`
    they depend on the seed, the worker and the number of the batch, without it on PyTorch's (for
    arrays NumPy's) global generator.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batches = 0

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids to show and labels, -100 where nothing is asked."""
        inputs = torch.as_tensor(inputs)
        return self._mask(inputs, special_tokens_mask, offset_mapping, torch.as_tensor)

    def numpy_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same of arrays."""
        return self._mask(np.asarray(inputs), special_tokens_mask, offset_mapping, np.asarray)

    def create_rng(self) -> None:
        """Nothing to create: `mlm_mask` takes the seed with every call."""
        self.generator = True

    def _mask(self, inputs: Any, special: Any, offsets: Any, convert: Any) -> tuple[Any, Any]:
        if special is None:
            special = [
                self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in inputs.tolist()
            ]
        special = np.asarray(special)
        words = None
        if self.whole_word_mask:
            words, _ = self._calc_word_ids_and_prob_mask(np.asarray(offsets), special)
            words = convert(words)
        masked, labels, _ = mlm_mask(
            inputs,
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            mask_prob=self.mlm_probability,
            mask_token_prob=self.mask_replace_prob,
            random_token_prob=self.random_replace_prob,
            special_token_ids=tuple(self.tokenizer.all_special_ids),
            special_tokens_mask=convert(special),
            seed=self._seed(),
            step=self._batches % 2**32,
            word_ids=words,
        )
        self._batches += 1
        return masked, labels

    def _seed(self) -> int:
        if self.seed is None:
            if self.return_tensors == "np":
                return int(np.random.randint(2**62))
            return int(torch.randint(2**62, ()))
        worker = torch.utils.data.get_worker_info()
        return self.seed + (0 if worker is None else worker.id)
