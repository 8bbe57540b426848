"""Calls of the CUDA kernels whose results are judged against float64: value by value.

Every check takes a backend (`cuda_emulation.kernels()`) and raises AssertionError. `CHECKS` holds
all of them by name; those of `SMALL` are few enough threads for ThreadSanitizer.
"""

from . import gae, mlm_mask, pair_losses, token_logprobs
from .registry import CHECKS, SMALL

__all__ = ["CHECKS", "SMALL", "gae", "mlm_mask", "pair_losses", "token_logprobs"]
