"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.bradley_terry_loss import BradleyTerryLoss, bradley_terry_loss
from .ops.dpo_loss import DPOLoss, dpo_loss
from .ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.mlm_mask import mlm_mask
from .ops.sequence_logps import sequence_logps
from .ops.token_logprobs import token_logprobs

__all__ = [
    "BradleyTerryLoss",
    "DPOLoss",
    "LinearCrossEntropy",
    "backends",
    "bradley_terry_loss",
    "dpo_loss",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "mlm_mask",
    "sequence_logps",
    "token_logprobs",
]
