"""Every operation in plain PyTorch: the definition, the oracle of the tests and the fallback.

Written from the papers, differentiable by autograd, on any device. Nothing is validated here
(`apt_kernels.checks` does that) and nothing but torch is imported. float64 inputs are computed in
float64; all others in float32.
"""

from .bookkeeping import ema_update_, queue_push_
from .contrastive import info_nce, nt_xent, siglip_loss, sup_con_loss
from .head import linear_token_logprobs, sequence_logps, token_logprobs
from .logprobs import linear_cross_entropy
from .masking import mlm_mask
from .policy import (
    gae,
    group_advantages,
    kl_penalty,
    linear_policy_loss,
    policy_loss,
    value_loss,
)
from .preference import bradley_terry_loss, dpo_loss, linear_dpo_loss

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "ema_update_",
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
