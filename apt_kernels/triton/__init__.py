"""The Triton kernels: one launcher `X_fwd` or `X_bwd` per name, on NVIDIA and AMD GPUs.

A launcher is imported when its name is first asked for: Triton and its kernels take a second to
load, and machines without a GPU never need them.
"""

import importlib
from importlib import metadata

try:
    VERSION = metadata.version("triton")
except metadata.PackageNotFoundError:  # a build of another name, as for AMD
    VERSION = importlib.import_module("triton").__version__
if tuple(map(int, VERSION.split(".")[:2])) < (3, 5):  # older ones cannot compile some kernels
    raise ImportError(f"Triton 3.5 (of PyTorch 2.9) or newer is needed, found {VERSION}")

# launcher -> its module
LAUNCHERS = {
    "bradley_terry_loss_fwd": "preference.bradley_terry_loss",
    "dpo_loss_fwd": "preference.dpo_loss",
    "ema_update_fwd": "contrastive.ema_update_",
    "gae_fwd": "policy.gae",
    "group_advantages_fwd": "policy.group_advantages",
    "info_nce_bwd": "contrastive.info_nce",
    "info_nce_fwd": "contrastive.info_nce",
    "kl_penalty_bwd": "policy.kl_penalty",
    "kl_penalty_fwd": "policy.kl_penalty",
    "linear_cross_entropy_fwd": "logprobs.linear_cross_entropy",
    "linear_policy_loss_fwd": "policy.linear_policy_loss",
    "linear_token_logprobs_bwd": "head.linear_token_logprobs",
    "linear_token_logprobs_fwd": "head.linear_token_logprobs",
    "mlm_mask_fwd": "masking.mlm_mask",
    "nt_xent_bwd": "contrastive.nt_xent",
    "nt_xent_fwd": "contrastive.nt_xent",
    "policy_loss_fwd": "policy.policy_loss",
    "queue_push_fwd": "contrastive.queue_push_",
    "sequence_logps_bwd": "logprobs.sequence_logps",
    "sequence_logps_fwd": "logprobs.sequence_logps",
    "siglip_loss_bwd": "contrastive.siglip_loss",
    "siglip_loss_fwd": "contrastive.siglip_loss",
    "sup_con_loss_bwd": "contrastive.sup_con_loss",
    "sup_con_loss_fwd": "contrastive.sup_con_loss",
    "token_logprobs_bwd": "logprobs.token_logprobs",
    "token_logprobs_fwd": "logprobs.token_logprobs",
    "value_loss_fwd": "policy.value_loss",
}

__all__ = list(LAUNCHERS)


def __getattr__(name):
    if name not in LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    launcher = getattr(importlib.import_module(f"{__name__}.{LAUNCHERS[name]}"), name)
    globals()[name] = launcher
    return launcher
