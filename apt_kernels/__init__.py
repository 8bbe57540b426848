"""Fused kernels for preference training and self-supervised pretraining, on the CPU and the GPU."""

from .dispatch import backends
from .ops.ema_update_ import ema_update_
from .ops.mlm_mask import mlm_mask
from .ops.queue_push_ import queue_push_
from .ops.token_logprobs import token_logprobs

__all__ = ["backends", "ema_update_", "mlm_mask", "queue_push_", "token_logprobs"]
