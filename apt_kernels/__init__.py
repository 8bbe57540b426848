"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.bradley_terry_loss import BradleyTerryLoss, bradley_terry_loss
from .ops.dpo_loss import DPOLoss, dpo_loss
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.kl_penalty import kl_penalty
from .ops.policy_loss import PolicyLoss, policy_loss
from .ops.sequence_logps import sequence_logps
from .ops.token_logprobs import token_logprobs
from .ops.value_loss import ValueLoss, value_loss

__all__ = [
    "BradleyTerryLoss",
    "DPOLoss",
    "PolicyLoss",
    "ValueLoss",
    "backends",
    "bradley_terry_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "kl_penalty",
    "policy_loss",
    "sequence_logps",
    "token_logprobs",
    "value_loss",
]
