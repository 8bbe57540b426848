"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.mlm_mask import mlm_mask
from .ops.token_logprobs import token_logprobs

__all__ = ["backends", "mlm_mask", "token_logprobs"]
