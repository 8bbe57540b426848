"""torchtune's DPO loss under its own name. Nothing of torchtune is imported."""

from __future__ import annotations

from torch import Tensor

from ..ops.preference import dpo_loss as _dpo


class DPOLoss(_dpo.DPOLoss):
    """`dpo_loss` with a loss a pair, as torchtune's recipes take the mean themselves."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta, label_smoothing, reduction="none")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, chosen_rewards, rejected_rewards), one a pair."""
        refs = (reference_chosen_logps, reference_rejected_logps)
        return super().forward(policy_chosen_logps, policy_rejected_logps, *refs)
