"""The rows of the first ten minutes, and what they are held against."""

from __future__ import annotations

import torch

from apt_kernels.registry import OPS, Benchmark
from places import device

ROWS: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("8192 x 151936",),
    "linear_token_logprobs": (
        "8192 x 4096 x 151936",
        "8192 x 4096 x 151936, frozen head",
        "8192 x 4096 x 151936, half masked",
    ),
    "linear_cross_entropy": ("8192 x 4096 x 128256", "65536 x 1024 x 30522, 15 % labelled"),
    "gae": ("8192 x 1024", "16 x 65536"),
    "nt_xent": tuple(f"2 x 32768 views, D = {width}" for width in (256, 512, 768)),
    "info_nce": tuple(f"symmetric {n} x {n}, D = 512" for n in (32768, 65536)),
    "policy_loss": ("256 x 8192",),
    "mlm_mask": ("8192 x 512",),
    "dpo_loss": ("1048576 pairs",),
}
# Milliseconds on an H200 in bfloat16, published or computed, by (operation, shape, pass).
TARGETS: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("token_logprobs", "8192 x 151936", "forward"): (0.62,),
    ("token_logprobs", "8192 x 151936", "backward"): (1.25,),
    ("linear_token_logprobs", "8192 x 4096 x 151936", "forward"): (15.0,),
    # the logits are computed again; they are kept
    ("linear_token_logprobs", "8192 x 4096 x 151936", "forward+backward"): (60.0, 47.0),
    ("nt_xent", "2 x 32768 views, D = 256", "forward+backward"): (22.0,),
    ("nt_xent", "2 x 32768 views, D = 512", "forward+backward"): (44.0,),
    ("nt_xent", "2 x 32768 views, D = 768", "forward+backward"): (66.0,),
    ("gae", "8192 x 1024", "forward"): (0.035,),
}


def shapes(operation: str) -> tuple[str, ...]:
    """The rows of an operation; in a rehearsal its first shape for a processor."""
    if device() == "cuda":
        return ROWS[operation]
    return next((b.name,) for b in OPS[operation].benchmarks if "cpu" in b.devices)


def benchmark(operation: str, shape: str) -> Benchmark:
    return next(b for b in OPS[operation].benchmarks if b.name == shape)


def dtype_of(operation: str) -> torch.dtype:
    """The dtype that a row is timed in first."""
    dtypes = OPS[operation].dtypes
    return torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]
