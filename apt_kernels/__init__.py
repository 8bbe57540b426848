"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.bradley_terry_loss import BradleyTerryLoss, bradley_terry_loss
from .ops.dpo_loss import DPOLoss, dpo_loss
from .ops.gae import gae
from .ops.sequence_logps import sequence_logps
from .ops.token_logprobs import token_logprobs

__all__ = [
    "BradleyTerryLoss",
    "DPOLoss",
    "backends",
    "bradley_terry_loss",
    "dpo_loss",
    "gae",
    "sequence_logps",
    "token_logprobs",
]
