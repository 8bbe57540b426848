"""The options of the DPO trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apt_kernels import dpo_loss

from ..training.config import check_flag, check_number

WITHOUT_REFERENCE = ("simpo", "orpo")  # and on averaged log-probabilities
LENGTHS = ("chosen_lengths", "rejected_lengths")  # arguments of `dpo_loss`
OF_WHOLE_BATCH = ("aot", "aot_unpaired", "kto_pair")  # a pair's loss depends on the other pairs


@dataclass
class DPOConfig:
    """The options of `DPOTrainer`; impossible values raise ValueError.

    Attributes:
        beta: strength of the pull to the reference; recommended 0.05-0.5.
        label_smoothing: probability that a preference is wrong; recommended 0-0.1.
        learning_rate: of the AdamW that is made without an optimizer; recommended 1e-6-1e-5.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        reference_free: take the reference as uniform: there is none.
        loss_type: as `apt_kernels.dpo_loss`.
        discopop_tau: as `apt_kernels.dpo_loss`.
        simpo_gamma: as `apt_kernels.dpo_loss`.
        average_logps: divide log-probabilities by the answer's length; None: for simpo and orpo.
        sft_coef: weight of the chosen answers' mean negative log-probability a token (averaged
            over pairs), as orpo wants it with 1.0.
        weight_decay: of the AdamW that is made without an optimizer.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    learning_rate: float = 1e-6
    max_grad_norm: float | None = 1.0
    reference_free: bool = False
    loss_type: str = "sigmoid"
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    average_logps: bool | None = None
    sft_coef: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError where an option cannot be, `dpo_loss` being asked for its own."""
        check_number(self, "beta", above=0)
        check_number(self, "label_smoothing", at_least=0, below=1)
        check_number(self, "learning_rate", at_least=0)
        check_number(self, "max_grad_norm", above=0, optional=True)
        check_number(self, "sft_coef", at_least=0)
        check_number(self, "weight_decay", at_least=0)
        check_flag(self, "reference_free")
        check_flag(self, "average_logps", optional=True)
        none = torch.zeros(0)
        reference = none if self.has_reference else None
        of_lengths = self.loss_type == "sigmoid_norm"
        lengths = dict.fromkeys(LENGTHS, none.long()) if of_lengths else {}
        options: dict[str, Any] = {**lengths, **self.loss_options()}
        dpo_loss(none, none, reference, reference, **options)
        if self.average_logps and self.loss_type == "sigmoid_norm":
            raise ValueError("average_logps and loss_type sigmoid_norm would divide twice")

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return not self.reference_free and self.loss_type not in WITHOUT_REFERENCE

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs, so that no batch can be cut."""
        return self.loss_type in OF_WHOLE_BATCH

    @property
    def averages_logps(self) -> bool:
        """Whether an answer's log-probability is its mean over tokens."""
        default = self.loss_type in WITHOUT_REFERENCE
        return default if self.average_logps is None else self.average_logps

    def loss_options(self) -> dict[str, Any]:
        """Returns the options of `apt_kernels.dpo_loss`, which is to be summed over pairs."""
        return {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "reference_free": self.reference_free,
            "loss_type": self.loss_type,
            "discopop_tau": self.discopop_tau,
            "simpo_gamma": self.simpo_gamma,
            "reduction": "sum",
        }
