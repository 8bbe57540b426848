"""Keys of MoCo's queue that are known to be of the same sample: no negatives of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_kernels import info_nce, token_logprobs


def read_sample_ids(sample_ids: Any, rows: int, once: bool) -> Tensor | None:
    """Returns checked ids of the samples of a batch, `(B,)` int64 on the CPU.

    Args:
        sample_ids: one integer at least 0 a row, or None.
        rows: of the batch.
        once: whether each id may stand there once only.

    Raises:
        ValueError: they do not fit the batch; the message says why.
    """
    if sample_ids is None:
        return None
    ids = torch.as_tensor(sample_ids, device="cpu")
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.shape != (rows,):
        raise ValueError(
            f"sample_ids: expected {rows} integers, one a row, got {tuple(ids.shape)} {ids.dtype}"
        )
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"sample_ids: expected numbers of at least 0, got {int(ids.min())}")
    values, counts = ids.unique(return_counts=True)
    if once and len(values) < rows:
        raise ValueError(
            f"sample_ids: expected each id once in a batch, got {int(values[counts.argmax()])} "
            f"{int(counts.max())} times: rows of one sample would be told apart"
        )
    return ids.long()


def moco_loss(
    query: Tensor, key: Tensor, queue: Tensor, same: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Returns MoCo's mean loss (He et al. 2020) and how many rows find their key.

    Of a row that has keys of its own sample in the queue the logits exist as a whole, so that those
    keys can be left out. The other rows go through the fused kernel.

    Args:
        query: `(B, D)`.
        key: `(B, D)`.
        queue: `(D, K)`.
        same: `(B, K)` on the CPU, True where the key is of the row's sample; None: nowhere.
        **options: `temperature` and `backend` of `info_nce`.
    """
    if same is None or not same.any():
        return info_nce(query, key, negatives=queue.T, return_correct=True, **options)
    hit = same.any(1)
    masked, others = (part.nonzero().flatten().to(query.device) for part in (hit, ~hit))
    losses, right = _masked_rows(
        query[masked], key[masked], queue, same[hit].to(query.device), options["temperature"]
    )
    loss, correct = losses.sum(), right.sum()
    if len(others):
        rest, found = info_nce(
            query[others], key[others], negatives=queue.T, reduction="sum", return_correct=True,
            **options,
        )  # fmt: skip
        loss, correct = loss + rest, correct + found
    return loss / len(query), correct


def _masked_rows(
    query: Tensor, key: Tensor, queue: Tensor, same: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each row without the keys in `same`, and whether it finds its own."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    own = (query * key).sum(1, keepdim=True)
    negatives = query @ F.normalize(queue, dim=0).to(query.dtype)
    negatives = negatives.masked_fill(same, float("-inf"))
    logits = torch.cat([own, negatives.to(own.dtype)], 1) / temperature
    right = logits[:, 0] > logits[:, 1:].amax(1)
    return -token_logprobs(logits, torch.zeros_like(right, dtype=torch.long)), right
