"""The Triton kernels: one launcher `X_fwd` or `X_bwd` per name, on NVIDIA and AMD GPUs."""

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):  # older ones cannot compile some
    raise ImportError(f"Triton 3.5 (of PyTorch 2.9) or newer is needed, found {triton.__version__}")

from apt_kernels.triton.contrastive.ema_update_ import ema_update_fwd
from apt_kernels.triton.contrastive.info_nce import info_nce_bwd, info_nce_fwd
from apt_kernels.triton.contrastive.nt_xent import nt_xent_bwd, nt_xent_fwd
from apt_kernels.triton.contrastive.queue_push_ import queue_push_fwd
from apt_kernels.triton.contrastive.siglip_loss import siglip_loss_bwd, siglip_loss_fwd
from apt_kernels.triton.contrastive.sup_con_loss import sup_con_loss_bwd, sup_con_loss_fwd
from apt_kernels.triton.logprobs.linear_cross_entropy import linear_cross_entropy_fwd
from apt_kernels.triton.logprobs.linear_token_logprobs import (
    linear_token_logprobs_bwd,
    linear_token_logprobs_fwd,
)
from apt_kernels.triton.logprobs.sequence_logps import sequence_logps_bwd, sequence_logps_fwd
from apt_kernels.triton.logprobs.token_logprobs import token_logprobs_bwd, token_logprobs_fwd
from apt_kernels.triton.masking.mlm_mask import mlm_mask_fwd
from apt_kernels.triton.policy.gae import gae_fwd
from apt_kernels.triton.policy.group_advantages import group_advantages_fwd
from apt_kernels.triton.policy.kl_penalty import kl_penalty_bwd, kl_penalty_fwd
from apt_kernels.triton.policy.linear_policy_loss import linear_policy_loss_fwd
from apt_kernels.triton.policy.policy_loss import policy_loss_fwd
from apt_kernels.triton.policy.value_loss import value_loss_fwd
from apt_kernels.triton.preference.bradley_terry_loss import bradley_terry_loss_fwd
from apt_kernels.triton.preference.dpo_loss import dpo_loss_fwd

__all__ = [
    "bradley_terry_loss_fwd",
    "dpo_loss_fwd",
    "ema_update_fwd",
    "gae_fwd",
    "group_advantages_fwd",
    "info_nce_bwd",
    "info_nce_fwd",
    "kl_penalty_bwd",
    "kl_penalty_fwd",
    "linear_cross_entropy_fwd",
    "linear_policy_loss_fwd",
    "linear_token_logprobs_bwd",
    "linear_token_logprobs_fwd",
    "mlm_mask_fwd",
    "nt_xent_bwd",
    "nt_xent_fwd",
    "policy_loss_fwd",
    "queue_push_fwd",
    "sequence_logps_bwd",
    "sequence_logps_fwd",
    "siglip_loss_bwd",
    "siglip_loss_fwd",
    "sup_con_loss_bwd",
    "sup_con_loss_fwd",
    "token_logprobs_bwd",
    "token_logprobs_fwd",
    "value_loss_fwd",
]
