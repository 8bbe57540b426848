"""A batch of masked sequences, checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt_kernels import mlm_mask

from .mlm_config import MLMConfig


def masked(
    config: MLMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    word_ids: Tensor | None,
    sample_ids: Tensor | None,
    step: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `mlm_mask` of these options."""
    return mlm_mask(
        input_ids,
        mask_token_id=config.mask_token_id,
        vocab_size=config.vocab_size,
        mask_prob=config.mask_prob,
        mask_token_prob=config.mask_token_prob,
        random_token_prob=config.random_token_prob,
        special_token_ids=config.special_ids,
        attention_mask=attention_mask,
        word_ids=word_ids,
        sample_ids=sample_ids,
        seed=config.seed,
        step=step,
        backend=backend,
    )


@dataclass
class MaskedBatch:
    """B sequences of which some tokens are to be predicted.

    Attributes:
        input_ids: `(B, S)`, masked.
        attention_mask: `(B, S)`, 1 = real token, or None where all are.
        token_type_ids: `(B, S)`, or None where the model is told none.
        positions: `(N,)`, the places to predict in the flattened batch.
        targets: `(N,)`, the tokens that were there.
        nsp_labels: `(B,)`, 0 = the second segment follows, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    positions: Tensor
    targets: Tensor
    nsp_labels: Tensor | None

    def chunk(self, parts: int) -> list[MaskedBatch]:
        """Returns at most `parts` batches of nearly as many sequences each."""
        rows, length = self.input_ids.shape
        parts = min(parts, rows)
        bounds = [part * rows // parts for part in range(parts + 1)]
        return [self._rows(slice(a, b), length) for a, b in itertools.pairwise(bounds)]

    def to(self, device: torch.device | str) -> MaskedBatch:
        """Returns the batch on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: None if t is None else t.to(device, torch.long, non_blocking=True)
            for name, t in tensors.items()
        }
        return MaskedBatch(**moved)

    def _rows(self, rows: slice, length: int) -> MaskedBatch:
        first, last = torch.searchsorted(
            self.positions, self.positions.new_tensor([rows.start * length, rows.stop * length])
        ).tolist()
        tensors = (self.attention_mask, self.token_type_ids, self.nsp_labels)
        mask, types, labels = (None if t is None else t[rows] for t in tensors)
        positions = self.positions[first:last] - rows.start * length
        return MaskedBatch(
            self.input_ids[rows], mask, types, positions, self.targets[first:last], labels
        )


def make_masked_batch(
    config: MLMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    nsp_labels: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    word_ids: Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
    *,
    step: int = 0,
    first_sample: int = 0,
    backend: str | None = None,
) -> MaskedBatch:
    """Returns a checked and masked batch, where the ids are.

    Of ids that come on the CPU the places to predict are found there: no device is waited for.

    Args:
        config: of the trainer.
        input_ids: `(B, S)` integers.
        attention_mask: `(B, S)`, 1 = real token; None: all are.
        nsp_labels: `(B,)`, 0 = the second segment follows, 1 = it was drawn at random.
        token_type_ids: `(B, S)`; None: 1 after the first [SEP] of a row, where there is NSP.
        word_ids: `(B, S)`: neighbours of one number are masked as one word, below 0 never.
        sample_ids: `(B,)` integers that key the masks; None: rows are numbered.
        step: keys the masks too.
        first_sample: the number of the first row.
        backend: of the kernel.

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check_ids(input_ids)
    ids = input_ids
    shape = tuple(ids.shape)
    for name, values in (
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
        ("word_ids", word_ids),
    ):
        if values is not None:
            _check_shape(name, values, shape, "as input_ids")
    real = None if attention_mask is None else (attention_mask.to(ids.device) != 0)
    if real is not None:
        ids = ids.masked_fill(~real, config.pad_token_id or 0)
    _check_vocabulary(ids, config.vocab_size)
    nsp_labels = _checked_nsp_labels(config, nsp_labels, len(ids))
    if sample_ids is None:
        sample_ids = torch.arange(first_sample, first_sample + len(ids), device=ids.device)
    sample_ids = torch.as_tensor(sample_ids, device=ids.device)
    _check_shape("sample_ids", sample_ids, shape[:1], "one a row")
    if token_type_ids is None and config.use_nsp:
        assert config.sep_token_id is not None  # MLMConfig checks it
        ends = ids.eq(config.sep_token_id).long()
        token_type_ids = (ends.cumsum(-1) - ends).clamp(max=1)
    words = None if word_ids is None else word_ids.to(ids.device)
    masked_ids, labels, chosen = masked(config, ids, real, words, sample_ids, step, backend)
    positions = chosen.flatten().nonzero().squeeze(-1)
    targets = labels.flatten()[positions]
    mask = None if real is None else real.long()
    return MaskedBatch(masked_ids, mask, token_type_ids, positions, targets, nsp_labels)


def _check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        came = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor (B, S) of integers, not empty, got {came}")


def _check_shape(name: str, values: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != shape:
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a tensor {shape}, {meaning}, got {came}")


def _check_vocabulary(ids: Tensor, size: int) -> None:
    if ids.device.type != "cpu":  # elsewhere it would wait for the device
        return
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"input_ids must be in [0, {size}), the vocab_size, got {int(low)} to {int(high)}"
        )


def _checked_nsp_labels(config: MLMConfig, labels: Tensor | None, rows: int) -> Tensor | None:
    if labels is None and config.use_nsp:
        raise ValueError("nsp_labels are needed: the configuration has use_nsp")
    if labels is None:
        return None
    if not config.use_nsp:
        raise ValueError("nsp_labels are given, but the configuration has use_nsp = False")
    _check_shape("nsp_labels", labels, (rows,), "one a row")
    if labels.is_floating_point():
        raise ValueError(f"nsp_labels must be integers, got {labels.dtype}")
    if labels.device.type == "cpu" and ((labels < 0) | (labels > 1)).any():
        raise ValueError(
            f"nsp_labels must be 0 (follows) or 1 (random), got {sorted(set(labels.tolist()))}"
        )
    return labels
