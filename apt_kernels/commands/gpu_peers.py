"""GPU kernels of other libraries as functions of a benchmark's arguments.

`of(operation)` gives those that are installed. None of them runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _flash_attn() -> Callable:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, token_ids: -cross_entropy_loss(logits, token_ids)[0]


def _quack() -> Callable:
    from quack.cross_entropy import cross_entropy

    return lambda logits, token_ids: -cross_entropy(logits, token_ids, reduction="none")


def _liger() -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # its backward overwrites the logits with their gradient
    return lambda logits, token_ids: (
        -liger_cross_entropy(logits.clone(), token_ids, reduction="none")
    )


def _cce_tokens() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden, weight, token_ids, *, mask=None):
        targets = token_ids if mask is None else token_ids.masked_fill(~mask, -100)
        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    return logps


def _cce_mean() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden, weight, labels, *, bias=None):
        if bias is None:
            return linear_cross_entropy(hidden, weight, labels)
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    return loss


def _liger_head() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden, weight, labels, *, bias=None):
        return liger_fused_linear_cross_entropy(hidden, weight, labels, bias)

    return loss


def _memeff() -> Callable:
    from memeff import MemoryEfficientCLIPLoss

    def loss(query, key, temperature, symmetric):  # theirs always is
        return MemoryEfficientCLIPLoss(temperature=temperature)(query, key)

    return loss


def _siglip_kernel() -> Callable:
    from siglip_kernel import fused_siglip_loss

    def loss(query, key, temperature, logit_bias):
        scale = query.new_tensor(1 / temperature).float().log()
        bias = query.new_tensor(logit_bias).float()
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return fused_siglip_loss(query, key, scale, bias)

    return loss


def _rl_triton() -> Callable:
    from rl_triton import compute_gae

    def advantages(rewards, values):  # theirs gives no returns
        never = torch.zeros_like(rewards)
        return compute_gae(rewards, values, never, gamma=0.99, lambda_=0.95)

    return advantages


PEERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "token_logprobs": {"flash-attn": _flash_attn, "QuACK": _quack, "Liger": _liger},
    "linear_token_logprobs": {"cut-cross-entropy": _cce_tokens},
    "linear_cross_entropy": {"cut-cross-entropy": _cce_mean, "Liger": _liger_head},
    "info_nce": {"memeff": _memeff},
    "gae": {"rl-triton": _rl_triton},
    "siglip_loss": {"siglip-kernel": _siglip_kernel},
}


def of(operation: str) -> tuple[dict[str, Callable], list[str]]:
    """(functions of the installed libraries, names of those that are not installed)."""
    found, missing = {}, []
    for name, load in PEERS.get(operation, {}).items():
        try:
            found[name] = load()
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return found, missing
