"""Random changes of token sequences: two of them of one text are a positive pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TextAugmentation:
    """Augmentations of token ids `(B, S)`, on their device, that modify nothing.

    All take these keywords: `attention_mask`, `(B, S)`, 1 = real token (None: all are, but for
    `pad_token_id`); `special_ids` and `pad_token_id`, which are neither masked nor deleted nor
    moved; `generator` of the random numbers (None: PyTorch's own), on any device.
    """

    @staticmethod
    def random_mask(
        input_ids: Tensor,
        mask_token_id: int,
        mask_prob: float = 0.15,
        *,
        attention_mask: Tensor | None = None,
        special_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the ids, each replaced by `mask_token_id` with probability `mask_prob`."""
        drawn = _drawn(input_ids, "mask_prob", mask_prob, generator)
        drawn &= _changeable(input_ids, attention_mask, special_ids, pad_token_id)
        return input_ids.masked_fill(drawn, mask_token_id)

    @staticmethod
    def random_delete(
        input_ids: Tensor,
        delete_prob: float = 0.1,
        *,
        attention_mask: Tensor | None = None,
        special_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the ids without those deleted, and the mask of what is left, `(B, longest)`.

        The survivors are packed to the left in their order. The first real token of a row is
        always kept, padding never. Behind them stands `pad_token_id`, or 0.
        """
        drawn = _drawn(input_ids, "delete_prob", delete_prob, generator)
        real = _real(input_ids, attention_mask, pad_token_id)
        kept = real & ~(drawn & _changeable(input_ids, attention_mask, special_ids, pad_token_id))
        if kept.shape[1]:
            first = (torch.where(real.any(1, keepdim=True), real, True)).byte().argmax(1, True)
            kept = kept.scatter(1, first, True)
        order = torch.sort((~kept).byte(), dim=1, stable=True).indices
        longest = int(kept.sum(1).max()) if kept.numel() else 0
        mask = kept.gather(1, order)[:, :longest]
        pad = 0 if pad_token_id is None else pad_token_id
        return input_ids.gather(1, order)[:, :longest].masked_fill(~mask, pad), mask.long()

    @staticmethod
    def random_swap(
        input_ids: Tensor,
        swap_prob: float = 0.1,
        *,
        attention_mask: Tensor | None = None,
        special_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the ids after swaps of neighbours, from position 1 to the right.

        With probability `swap_prob` each what then stands at position i and at i + 1 change
        places: a token is carried on as long as swaps follow each other.
        """
        changeable = _changeable(input_ids, attention_mask, special_ids, pad_token_id)
        swapped = _drawn(input_ids, "swap_prob", swap_prob, generator) & changeable
        swapped[:, :1] = False
        swapped[:, :-1] &= changeable[:, 1:]
        swapped[:, -1:] = False
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        # A token that is carried on comes from where its run of swaps began
        carried = torch.zeros_like(swapped)
        carried[:, 1:] = swapped[:, :-1]
        begin = torch.where(carried, 0, places).cummax(1).values
        return input_ids.gather(1, torch.where(swapped, places + 1, begin).clamp(max=_last(places)))


def _last(places: Tensor) -> int:
    return max(places.shape[1] - 1, 0)


def _drawn(ids: Tensor, name: str, probability: float, generator: torch.Generator | None) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        came = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor (B, S) of integers, got {came}")
    if not 0 <= probability <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {probability}")
    device = ids.device if generator is None else generator.device
    return (torch.rand(ids.shape, generator=generator, device=device) < probability).to(ids.device)


def _real(ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, "
                f"got {tuple(attention_mask.shape)}"
            )
        return attention_mask.to(ids.device) != 0
    if pad_token_id is not None:
        return ids != pad_token_id
    return torch.ones_like(ids, dtype=torch.bool)


def _changeable(
    ids: Tensor, mask: Tensor | None, special_ids: Sequence[int], pad_token_id: int | None
) -> Tensor:
    changeable = _real(ids, mask, pad_token_id)
    for special in special_ids:
        changeable &= ids != special
    return changeable
