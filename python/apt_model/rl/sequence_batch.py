"""A batch of sampled sequences, and which of their tokens the policy answers for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..scoring.hidden_states import last_real
from .batch_checks import (
    check_responses,
    check_vocabulary,
    checked_ids,
    checked_mask,
    checked_prompt_lengths,
)


@dataclass
class SequenceBatch:
    """N sequences.

    Attributes:
        input_ids: `(N, S)`, 0 at padding.
        attention_mask: `(N, S)`, 1 = real token, or None where all are.
        counted: `(N, S)`, True at the tokens of responses.
        columns: more of each row, `(N, …)`, by name. "learned" is False where nothing is to be
            learned of a row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    counted: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self.input_ids)

    @property
    def real(self) -> Tensor:
        """`(N, S)`, 1 = real token."""
        mask = self.attention_mask
        return torch.ones_like(self.input_ids) if mask is None else mask

    @property
    def response_tokens(self) -> Tensor:
        """`(N, S-1)`: which log-probabilities are of responses."""
        return self.counted[:, 1:]

    @property
    def tokens(self) -> Tensor:
        """`(N, S-1)`: which log-probabilities count: of the responses that are learned from."""
        learned = self.columns.get("learned")
        tokens = self.response_tokens
        return tokens if learned is None else tokens & learned.unsqueeze(1)

    def sequences(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns ids, attention mask and counted tokens, as scorers take them."""
        return self.input_ids, self.attention_mask, self.counted

    def select(self, rows: Tensor | slice) -> SequenceBatch:
        """Returns some of the rows."""
        mask = self.attention_mask
        return SequenceBatch(
            self.input_ids[rows],
            None if mask is None else mask[rows],
            self.counted[rows],
            {name: column[rows] for name, column in self.columns.items()},
        )

    def chunk(self, parts: int) -> list[SequenceBatch]:
        """Returns at most `parts` batches of nearly as many rows each."""
        rows = torch.arange(self.rows, device=self.input_ids.device)
        return [self.select(part) for part in rows.tensor_split(min(parts, self.rows))]


def make_sequence_batch(
    responses: Tensor,
    response_masks: Tensor | None = None,
    *,
    response_token_mask: Tensor | None = None,
    prompt_lengths: int | Sequence[int] | Tensor | None = None,
    old_log_probs: Tensor | None = None,
    rows: Tensor | Sequence[int] | None = None,
    finished: Tensor | Sequence[bool] | None = None,
    device: torch.device | str = "cpu",
    vocabulary_size: int | None = None,
) -> SequenceBatch:
    """Returns sequences as one checked batch on `device`.

    A token counts when it is real, follows a real token, and is not of the prompt.

    Args:
        responses: `(N, S)` or `(n, group, S)` (as all that follow), integers, prompts included;
            padding may be on either side.
        response_masks: `(N, S)`, 1 = real token; None: all are.
        response_token_mask: `(N, S)`, 1 = token of the response; None: all real ones are.
        prompt_lengths: `(N,)` or a number: how many real tokens the prompts have, instead.
        old_log_probs: `(N, S-1)`, at sampling time: the column `old_logps`, where given.
        rows: `(N,)`, the position of each one's prompt among the rows of the data: the column
            `rows`, where given.
        finished: `(N,)`, whether each response ended by itself: the column `finished`, where given.
        device: where everything is moved.
        vocabulary_size: ids beyond it are an error (on the CPU: elsewhere looking would wait).

    Raises:
        ValueError: names the argument that does not fit.
    """
    if isinstance(responses, Tensor) and responses.dim() == 3:
        grouped = (responses, response_masks, response_token_mask, prompt_lengths, old_log_probs)
        flat: list[Any] = [
            t.flatten(0, 1) if isinstance(t, Tensor) and t.dim() > 1 else t for t in grouped
        ]
        responses, response_masks, response_token_mask, prompt_lengths, old_log_probs = flat
    ids = checked_ids("responses", responses, device)
    mask = checked_mask("response_masks", response_masks, ids)
    answers = checked_mask("response_token_mask", response_token_mask, ids)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    if prompt_lengths is not None:
        if answers is not None:
            raise ValueError("give prompt_lengths or response_token_mask, not both")
        lengths = checked_prompt_lengths(prompt_lengths, len(ids), device)
        answers = real.cumsum(-1) > lengths.unsqueeze(-1)
    counted = real & F.pad(real[:, :-1], (1, 0))
    if answers is not None:
        counted = counted & answers
    ids = ids.masked_fill(~real, 0)
    check_vocabulary("responses", ids, vocabulary_size)
    check_responses("responses", counted)
    batch = SequenceBatch(ids, None if mask is None else mask.long(), counted)
    if old_log_probs is not None:
        batch.columns["old_logps"] = checked_logps("old_log_probs", old_log_probs, batch)
    if rows is not None:
        batch.columns["rows"] = _of_each("rows", rows, batch).long()
    if finished is not None:
        batch.columns["finished"] = _of_each("finished", finished, batch) != 0
    return batch


def _of_each(name: str, values: Any, batch: SequenceBatch) -> Tensor:
    """Returns one integer or bool a sequence, `(N,)`, where the batch is."""
    values = torch.as_tensor(values).flatten()
    if values.is_floating_point() or len(values) != batch.rows:
        raise ValueError(
            f"{name}: expected ({batch.rows},) integers, got {tuple(values.shape)} {values.dtype}"
        )
    return values.to(batch.input_ids.device)


def checked_logps(name: str, logps: Tensor, batch: SequenceBatch) -> Tensor:
    """Returns one number a token but the first, `(N, S-1)`, where the batch is.

    Those of tokens that count must be finite, where looking does not wait.
    """
    if not isinstance(logps, Tensor) or logps.shape != batch.tokens.shape:
        came = tuple(logps.shape) if isinstance(logps, Tensor) else type(logps).__name__
        raise ValueError(f"{name} must be a tensor {tuple(batch.tokens.shape)}, got {came}")
    logps = logps.detach().to(batch.input_ids.device)
    wrong = batch.tokens & ~logps.isfinite() if logps.device.type == "cpu" else None
    if wrong is not None and wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, got {float(logps[row, token])} in row {row}, place {token}"
        )
    return logps


def at_last_token(rewards: Tensor, tokens: Tensor) -> Tensor:
    """Returns rewards `(N,)` at each row's last token that counts, `(N, T)`, 0 elsewhere."""
    placed = rewards.new_zeros(tokens.shape)
    return placed.scatter(1, last_real(tokens).unsqueeze(1), rewards.unsqueeze(1))


def minibatches(batch: SequenceBatch, size: int, groups: Sequence[Any]) -> tuple[Tensor, ...]:
    """Returns the rows of each minibatch of at most `size`, shuffled.

    Every process of the process groups has as many minibatches, so that all make as many updates.
    """
    device, parts = batch.input_ids.device, -(-batch.rows // size)
    for group in groups:
        most = torch.tensor(parts, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        parts = int(most)
    if batch.rows < parts:
        raise ValueError(f"{batch.rows} rows here, but {parts} minibatches in another process")
    return torch.randperm(batch.rows).to(device).tensor_split(parts)
