"""A batch of preference pairs: chosen and rejected answers as one batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_checks import check_vocabulary, checked_ids, checked_mask, checked_prompt_lengths


@dataclass
class PairBatch:
    """B pairs; index 0 of the first dimension is the chosen answer, 1 the rejected one.

    Attributes:
        input_ids: `(2, B, S)`, 0 at padding.
        attention_mask: `(2, B, S)`, 1 = real token, or None where all are.
        counted: `(2, B, S)`, True at the tokens whose log-probabilities count.
        ref_logps: `(2, B)`, precomputed, or None.
        margins: `(1, B)`, by how much the chosen answers are better, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    counted: Tensor
    ref_logps: Tensor | None
    margins: Tensor | None = None

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return self.input_ids.shape[1]

    def chunk(self, parts: int) -> list[PairBatch]:
        """Returns at most `parts` batches of nearly as many pairs each."""

        def split(tensor: Tensor | None) -> Sequence[Tensor | None]:
            count = min(parts, self.pairs)
            return [None] * count if tensor is None else tensor.tensor_split(count, dim=1)

        fields = (
            self.input_ids, self.attention_mask, self.counted, self.ref_logps, self.margins
        )  # fmt: skip
        return [PairBatch(*part) for part in zip(*map(split, fields), strict=True)]

    def with_margins(self, margin: float | Sequence[float] | Tensor) -> PairBatch:
        """Returns the batch with margins: a number, or one a pair, `(B,)` or `(B, 1)`."""
        if isinstance(margin, Tensor):
            margins = margin.detach()
        else:
            margins = torch.as_tensor(margin, dtype=torch.float64)
        if margins.shape not in ((), (self.pairs,), (self.pairs, 1)):
            raise ValueError(
                f"margin must be a number or ({self.pairs},) numbers, got {tuple(margins.shape)}"
            )
        margins = margins.to(self.input_ids.device, torch.float64)
        return replace(self, margins=margins.reshape(1, -1).expand(1, self.pairs))

    def sequences(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns ids, attention mask and counted tokens as `(2B, S)`, the chosen rows first."""
        attention = None if self.attention_mask is None else self.attention_mask.flatten(0, 1)
        return self.input_ids.flatten(0, 1), attention, self.counted.flatten(0, 1)


def make_pair_batch(
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    prompt_lengths: int | Sequence[int] | Tensor | None = None,
    chosen_response_mask: Tensor | None = None,
    rejected_response_mask: Tensor | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    device: torch.device | str = "cpu",
    vocabulary_size: int | None = None,
) -> PairBatch:
    """Returns the pairs as one checked batch on `device`.

    A token counts when it is real, follows a real token, and is not of the prompt.

    Args:
        chosen_ids: `(B, S)`, integers; padding may be on either side.
        rejected_ids: `(B, T)`.
        chosen_mask: `(B, S)`, 1 = real token; None: all are.
        rejected_mask: `(B, T)`.
        prompt_lengths: `(B,)` or a number: how many real tokens both answers' prompts have.
        chosen_response_mask: `(B, S)`, 1 = token of the answer, instead of `prompt_lengths`.
        rejected_response_mask: `(B, T)`. A side without one counts from its second token.
        ref_chosen_logps: `(B,)`, log-probabilities of the answers under the reference.
        ref_rejected_logps: `(B,)`.
        device: where everything is moved.
        vocabulary_size: ids beyond it are an error (checked on the CPU only: elsewhere it would
            wait for the device).

    Raises:
        ValueError: names the argument that does not fit.
    """
    sides = [
        checked_ids("chosen_ids", chosen_ids, device),
        checked_ids("rejected_ids", rejected_ids, device),
    ]
    pairs = len(sides[0])
    if len(sides[1]) != pairs:
        raise ValueError(f"rejected_ids must have {pairs} rows as chosen_ids, got {len(sides[1])}")
    masks = [
        checked_mask(f"{side}_mask", mask, ids)
        for side, mask, ids in zip(
            ("chosen", "rejected"), (chosen_mask, rejected_mask), sides, strict=True
        )
    ]
    answers = [
        checked_mask(f"{side}_response_mask", mask, ids)
        for side, mask, ids in zip(
            ("chosen", "rejected"),
            (chosen_response_mask, rejected_response_mask),
            sides,
            strict=True,
        )
    ]
    if prompt_lengths is not None:
        if answers != [None, None]:
            raise ValueError("give prompt_lengths or response masks, not both")
        lengths = checked_prompt_lengths(prompt_lengths, pairs, device)
    width = max(ids.shape[1] for ids in sides)
    all_real = masks == [None, None] and sides[0].shape == sides[1].shape
    counted, reals = [], []
    for index, ids in enumerate(sides):
        mask, answer = masks[index], answers[index]
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if prompt_lengths is not None:
            answer = real.cumsum(-1) > lengths.unsqueeze(-1)
        follows = F.pad(real[:, :-1], (1, 0))
        counts = real & follows if answer is None else real & follows & answer
        counted.append(F.pad(counts, (0, width - ids.shape[1])))
        sides[index] = F.pad(ids.masked_fill(~real, 0), (0, width - ids.shape[1]))
        reals.append(F.pad(real, (0, width - ids.shape[1])))
    input_ids = torch.stack(sides)
    if vocabulary_size is not None and input_ids.device.type == "cpu":
        check_vocabulary("chosen_ids and rejected_ids", input_ids, vocabulary_size)
    return PairBatch(
        input_ids,
        None if all_real else torch.stack(reals).long(),
        torch.stack(counted),
        _checked_ref_logps(ref_chosen_logps, ref_rejected_logps, pairs, device),
    )


def _checked_ref_logps(
    chosen: Tensor | None, rejected: Tensor | None, pairs: int, device: torch.device | str
) -> Tensor | None:
    if chosen is None and rejected is None:
        return None
    for name, logps in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
        if not isinstance(logps, Tensor) or logps.shape != (pairs,):
            came = tuple(logps.shape) if isinstance(logps, Tensor) else type(logps).__name__
            raise ValueError(f"{name} must be a tensor ({pairs},), got {came}")
    assert chosen is not None and rejected is not None
    return torch.stack([chosen.detach(), rejected.detach()]).to(device)
