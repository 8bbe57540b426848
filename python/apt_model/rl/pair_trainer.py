"""The base of the trainers of preference pairs: a step is made of a batch of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.devices import evaluating
from ..training.loop import TrainingLoop, read_numbers
from .pair_batch import PairBatch


class PairTrainer(TrainingLoop):
    """The loop of a model that is trained on pairs of a chosen and a rejected answer.

    A trainer says how the arguments of its `train_step` become a batch (`_batch`), and what a
    batch's share of the loss is (`_share`).
    """

    @property
    def _trained(self) -> nn.Module:
        """The model that is trained."""
        return next(iter(self._modules.values()))

    def _batch(self, *args: Any, **batch: Any) -> PairBatch:
        """Returns the checked batch of the arguments of a step."""
        raise NotImplementedError

    def _share(self, batch: PairBatch, count: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of `count` pairs."""
        raise NotImplementedError

    def _share_of_all(self, pairs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            return self._share(pairs, pairs.pairs)

    def _train_on(self, pairs: PairBatch) -> dict[str, float]:
        """Makes one optimizer step, in `gradient_accumulation_steps` parts."""
        return self._train(pairs.chunk(self.gradient_accumulation_steps))

    def train_micro_batches(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Makes one optimizer step on several batches, as if they were one.

        Args:
            batches: the arguments of `train_step` of each; sizes and lengths may differ.
        """
        return self._train([self._batch(**batch) for batch in batches])

    @torch.no_grad()
    def eval_step(self, *args: Any, **batch: Any) -> dict[str, float]:
        """Returns what `train_step` does, of all processes' batches, in evaluation mode.

        Args: as `train_step`.
        """
        pairs = self._batch(*args, **batch)
        with evaluating(self._trained), self.autocast():
            loss, metrics = self._share(pairs, self.count_over_processes(pairs.pairs))
        return read_numbers({"loss": loss, **metrics}, self._data_parallel_groups)

    def _train(self, batches: list[PairBatch]) -> dict[str, float]:
        self._train_mode()
        count = self.count_over_processes(sum(batch.pairs for batch in batches))
        return self.update(batches, lambda batch: self._share(batch, count))
