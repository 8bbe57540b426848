"""torchtune's DPO loss under its own name. Nothing of torchtune is imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..ops.preference import dpo_loss as _dpo


class DPOLoss(_dpo.DPOLoss):
    """`dpo_loss` with a loss a pair, as torchtune's recipes take the mean themselves."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta, label_smoothing, reduction="none")

    def forward(  # type: ignore[override]  # the names that torchtune uses
        self,
        policy_chosen_logps: Any,
        policy_rejected_logps: Any,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair and its rewards.

        Takes four tensors `(B,)`, as torchtune 0.6 calls it, or two objects with the attributes
        `chosen_logps` and `rejected_logps`, of the policy and of the reference, as its main does.

        Returns:
            (losses, chosen_rewards, rejected_rewards), one a pair.
        """
        given = (policy_chosen_logps, policy_rejected_logps)
        refs = (reference_chosen_logps, reference_rejected_logps)
        if all(hasattr(x, "chosen_logps") and hasattr(x, "rejected_logps") for x in given):
            for name, ref in zip(("reference_chosen_logps", "reference_rejected_logps"), refs):
                checks.unused(name, ref, "the second object has the reference's")
            given, refs = ((x.chosen_logps, x.rejected_logps) for x in given)
        return super().forward(*given, *refs)
