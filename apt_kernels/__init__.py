"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.token_logprobs import token_logprobs

__all__ = [
    "LinearCrossEntropy",
    "backends",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "token_logprobs",
]
