"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends, empty_cache
from .masking_collator import MaskingCollator
from .ops.bradley_terry_loss import BradleyTerryLoss, bradley_terry_loss
from .ops.dpo_loss import DPOLoss, dpo_loss
from .ops.ema_update_ import ema_update_
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.info_nce import InfoNCELoss, info_nce
from .ops.kl_penalty import kl_penalty
from .ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .ops.linear_dpo_loss import LinearDPOLoss, linear_dpo_loss
from .ops.linear_policy_loss import linear_policy_loss
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.mlm_mask import mlm_mask
from .ops.nt_xent import NTXentLoss, nt_xent
from .ops.policy_loss import policy_loss
from .ops.policy_modules import LinearPolicyLoss, PolicyLoss
from .ops.queue_push_ import queue_push_
from .ops.sequence_logps import sequence_logps
from .ops.siglip_loss import SigLIPLoss, siglip_loss
from .ops.sup_con_loss import SupConLoss, sup_con_loss
from .ops.token_logprobs import token_logprobs
from .ops.value_loss import ValueLoss, value_loss

__all__ = [
    "BradleyTerryLoss",
    "DPOLoss",
    "InfoNCELoss",
    "LinearCrossEntropy",
    "LinearDPOLoss",
    "LinearPolicyLoss",
    "MaskingCollator",
    "NTXentLoss",
    "PolicyLoss",
    "SigLIPLoss",
    "SupConLoss",
    "ValueLoss",
    "backends",
    "bradley_terry_loss",
    "dpo_loss",
    "ema_update_",
    "empty_cache",
    "gae",
    "group_advantages",
    "info_nce",
    "kl_penalty",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_policy_loss",
    "linear_token_logprobs",
    "mlm_mask",
    "nt_xent",
    "policy_loss",
    "queue_push_",
    "sequence_logps",
    "siglip_loss",
    "sup_con_loss",
    "token_logprobs",
    "value_loss",
]
