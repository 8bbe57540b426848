"""The weight of a KL penalty, fixed or adapted to a target."""

from __future__ import annotations

from collections.abc import Mapping

RATE = 0.1  # K_beta
LARGEST_ERROR = 0.2


class KLCoefficient:
    """The weight of the KL penalty; with a target it follows what is measured.

    The controller comes from Ziegler 2019, "Fine-tuning language models from human preferences",
    section 2.2: e = clip((kl - target) / target, -0.2, 0.2), weight *= 1 + 0.1 e.

    Args:
        value: of the weight, at first.
        target: of the divergence, in nats a token; None: the weight stays.
    """

    def __init__(self, value: float, target: float | None = None) -> None:
        self.value = value
        self.target = target

    def follow(self, kl: float) -> None:
        """Adapts the weight to a divergence that was measured."""
        if self.target is None:
            return
        error = (kl - self.target) / self.target
        self.value *= 1 + RATE * min(max(error, -LARGEST_ERROR), LARGEST_ERROR)

    def state_dict(self) -> dict[str, float]:
        """Returns the weight."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Sets the weight."""
        self.value = state["value"]
