"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.token_logprobs import token_logprobs

__all__ = ["backends", "token_logprobs"]
