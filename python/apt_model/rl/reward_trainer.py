"""Training of reward models on preference pairs (Bradley & Terry 1952, Ouyang 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_kernels import bradley_terry_loss

from ..scoring.expert_balance import ExpertBalance, add_balance
from ..scoring.model_access import base_model, vocabulary_size
from ..scoring.sequence_scores import SequenceScores
from .batch_checks import check_real_rows
from .pair_batch import PairBatch, make_pair_batch
from .pair_trainer import PairTrainer
from .reward_output import rewards_of


class RewardModelTrainer(PairTrainer):
    """Trains a reward model on preference pairs: mean of -log sigmoid(r_c - r_r - margin).

    Args:
        reward_model: a `RewardModel`, a classifier of transformers with one label, or any other
            module that takes `(ids, masks)`; what it may return is in `rewards_of`.
        optimizer: None: AdamW.
        device: None: where the model is.
        margin: by how much the chosen answers are better; a step may bring one a pair.
        center_coef: weight of mean((r_c + r_r)^2), which keeps the rewards around 0.
        learning_rate: of the AdamW that is made without an optimizer.
        backend: of the kernel.
        router_aux_loss_coef: weight of the balancing loss of a mixture of experts; None: the
            configuration's.
        **options: `gradient_accumulation_steps`, `autocast_dtype`, `scheduler`, `max_grad_norm`,
            `weight_decay`, `log`, as `TrainingLoop` has them.
    """

    monitored = ("loss", "accuracy", "reward_margin")
    statistics: ClassVar = {
        name: name
        for name in (
            "loss", "accuracy", "chosen_reward_mean", "rejected_reward_mean", "reward_margin",
        )
    }  # fmt: skip

    def __init__(
        self,
        reward_model: nn.Module,
        optimizer: Optimizer | None = None,
        device: torch.device | str | None = None,
        margin: float = 0.0,
        *,
        center_coef: float = 0.0,
        learning_rate: float = 1e-5,
        backend: str | None = None,
        router_aux_loss_coef: float | None = None,
        **options: Any,
    ) -> None:
        # The kernel checks its own options
        bradley_terry_loss(*torch.zeros(2, 0), margin=margin, center_coef=center_coef)
        super().__init__(
            {"reward": reward_model},
            optimizer,
            learning_rate=learning_rate,
            device=device,
            **options,
        )
        self.model = reward_model
        self.margin = margin
        self.center_coef = center_coef
        self._backend = backend
        self._call = SequenceScores(reward_model)
        inner = base_model(reward_model)
        base = getattr(inner, "base_model", inner)
        self._balance = ExpertBalance(base, router_aux_loss_coef)
        self._vocabulary_size = vocabulary_size(base)

    def compute_loss(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        margin: float | Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """Returns the mean loss of the pairs, with its graph.

        Args:
            chosen_ids: `(B, S)`.
            rejected_ids: `(B, T)`.
            chosen_mask: `(B, S)`, 1 = real token; padding on either side.
            rejected_mask: `(B, T)`.
            margin: a number or `(B,)`, instead of the trainer's.
        """
        pairs = self._batch(chosen_ids, rejected_ids, chosen_mask, rejected_mask, margin)
        return self._share_of_all(pairs)[0]

    def train_step(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        margin: float | Sequence[float] | Tensor | None = None,
    ) -> dict[str, float]:
        """Makes one optimizer step on a batch of pairs, in `gradient_accumulation_steps` parts.

        Args: as `compute_loss`.

        Returns:
            `loss, accuracy, chosen_reward_mean, rejected_reward_mean, reward_margin`, before the
            update; an accuracy counts a tie as one half.

        Raises:
            ValueError: an argument does not fit. FloatingPointError: the loss or a gradient is not
                finite. Either way no parameter was changed.
        """
        pairs = self._batch(chosen_ids, rejected_ids, chosen_mask, rejected_mask, margin)
        return self._train_on(pairs)

    def _batch(
        self,
        chosen_ids: Tensor,
        rejected_ids: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        margin: float | Sequence[float] | Tensor | None = None,
    ) -> PairBatch:
        pairs = make_pair_batch(
            chosen_ids,
            rejected_ids,
            chosen_mask,
            rejected_mask,
            device=self.device,
            vocabulary_size=self._vocabulary_size,
        )
        for name, mask in (("chosen_mask", chosen_mask), ("rejected_mask", rejected_mask)):
            if mask is not None:
                check_real_rows(name, mask)
        return pairs.with_margins(self.margin if margin is None else margin)

    def _share(self, batch: PairBatch, count: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's share of the loss and metrics of `count` pairs."""
        ids, mask, _ = batch.sequences()
        with self._balance.listening(mask) as balance:
            rewards = rewards_of(self._call(self.model, ids, mask), len(ids))
        if torch.is_grad_enabled() and not rewards.requires_grad:
            raise ValueError(
                "the reward model's rewards have no gradient: expected tensors that its parameters "
                "made, not numbers or detached tensors"
            )
        chosen, rejected = rewards.chunk(2)
        loss = bradley_terry_loss(
            chosen,
            rejected,
            margin=None if batch.margins is None else batch.margins[0],
            center_coef=self.center_coef,
            reduction="sum",
            backend=self._backend,
        )
        chosen, rejected = chosen.detach(), rejected.detach()
        sums = {
            "accuracy": 0.5 * (1 + (chosen - rejected).sign()).sum(),
            "chosen_reward_mean": chosen.sum(),
            "rejected_reward_mean": rejected.sum(),
            "reward_margin": (chosen - rejected).sum(),
        }
        shares = {name: value / count for name, value in sums.items()}
        kept = balance[0] if balance else None
        return add_balance(kept, batch.pairs / count, loss / count, shares)
