"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from importlib import metadata as _metadata

from .dispatch import backends, empty_cache
from .ops.contrastive.ema_update_ import ema_update_
from .ops.contrastive.info_nce import InfoNCELoss, info_nce
from .ops.contrastive.nt_xent import NTXentLoss, nt_xent
from .ops.contrastive.queue_push_ import queue_push_
from .ops.contrastive.siglip_loss import SigLIPLoss, siglip_loss
from .ops.contrastive.sup_con_loss import SupConLoss, sup_con_loss
from .ops.logprobs.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .ops.logprobs.linear_token_logprobs import linear_token_logprobs
from .ops.logprobs.sequence_logps import sequence_logps
from .ops.logprobs.token_logprobs import token_logprobs
from .ops.masking.masking_collator import MaskingCollator
from .ops.masking.mlm_mask import mlm_mask
from .ops.masking.tokenizer_ids import never_words
from .ops.policy.gae import gae
from .ops.policy.group_advantages import group_advantages
from .ops.policy.kl_penalty import kl_penalty
from .ops.policy.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from .ops.policy.policy_loss import PolicyLoss, policy_loss
from .ops.policy.value_loss import ValueLoss, value_loss
from .ops.preference.bradley_terry_loss import BradleyTerryLoss, bradley_terry_loss
from .ops.preference.dpo_loss import DPOLoss, dpo_loss
from .ops.preference.linear_dpo_loss import LinearDPOLoss, linear_dpo_loss

try:
    __version__ = _metadata.version("apt-kernels")
except _metadata.PackageNotFoundError:  # the sources on a path, not installed
    __version__ = "unknown"

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
    "never_words",
    "nt_xent",
    "policy_loss",
    "queue_push_",
    "sequence_logps",
    "siglip_loss",
    "sup_con_loss",
    "token_logprobs",
    "value_loss",
]
