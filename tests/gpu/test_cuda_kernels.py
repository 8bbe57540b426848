"""The CUDA kernels, emulated on the CPU, against float64 (cuda_emulation/checks.py)."""

from __future__ import annotations

import pytest
import torch

from gpu import cuda_emulation
from gpu.cuda_emulation import sanitized
from gpu.cuda_emulation.checks import CHECKS, SMALL

ORDERS = ("forward", "reverse", "random")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("order", ORDERS)
def test_against_float64(name, order):
    CHECKS[name](cuda_emulation.kernels(order=order, seed=5))


def test_results_do_not_depend_on_the_order_of_threads():
    logits, ids = torch.randn(2, 3, 4001), torch.randint(0, 4001, (2, 3, 2))
    pairs = torch.randn(4, 9000).unbind()
    results = []
    for order in ORDERS:
        kernels = cuda_emulation.kernels(order=order, seed=11)
        logps, entropy, lse = kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)
        saved = (logits, ids, None, None, lse, entropy, 1.0, 0.0)
        grad = kernels.token_logprobs_bwd(logps, entropy, *saved)
        dpo = kernels.dpo_loss_fwd(*pairs, 0, 1, 0.1, 0.1, 0.05, 0.5)
        results.append((logps, entropy, lse, grad, *dpo))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_too_large_sizes_are_refused():
    kernels = cuda_emulation.kernels()
    logits = torch.empty(1).expand(1, 1, 1 << 31)
    ids = torch.zeros(1, 1, 1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="the launcher refuses"):
        kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, False)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_under_sanitizer(sanitizer):
    """All checks under AddressSanitizer and UBSan; those of few threads under ThreadSanitizer."""
    if sanitized.runtime(sanitizer) is None:
        pytest.skip(f"{cuda_emulation.compiler()} comes without the {sanitizer} sanitizer")
    job = sanitized.Job("all", SMALL if sanitizer == "thread" else [])
    run = sanitized.run_checks(sanitizer, [job], go_on=False)
    assert run.returncode == 0 and "== finished" in run.stdout, run.stdout[-8000:]
    assert not any(sign in run.stdout for sign in sanitized.SIGNS[sanitizer]), run.stdout[-8000:]


# What one launch may ask of memory, per byte of the floor (logits read, or read and written).
MOST = 1.02  # peeled heads and tails, and the elements of the ids


def _traffic(call) -> tuple:
    kernels = cuda_emulation.kernels()
    kernels.start_counting()
    call(kernels)
    return kernels.stop_counting()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [32000, 32003, 50257])
def test_requests_are_wide_and_few(vocab, dtype):
    """At least 256 bytes a warp request and at most 1.02 times the bytes, odd V or not."""
    logits = torch.randn(1, 3, vocab).to(dtype)
    ids = torch.randint(0, vocab, (1, 3, 1))
    floor = logits.numel() * dtype.itemsize
    saved = (logits, ids, None, None, torch.zeros(1, 3).double(), torch.zeros(1, 3), 1.0, 0.0)
    upstream = torch.zeros(1, 3, 1), torch.zeros(1, 3)

    def forward(kernels):
        kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)

    def backward(kernels):
        kernels.token_logprobs_bwd(*upstream, *saved)

    sectors = MOST if vocab % 16 == 0 else 1.1  # rows of odd length begin in the middle of one
    loads, stores = _traffic(forward)
    _assert_streaming(loads, floor, sectors)
    assert stores.bytes == 0
    loads, stores = _traffic(backward)
    _assert_streaming(loads, floor, sectors)
    _assert_streaming(stores, floor, sectors)


def _assert_streaming(traffic, floor: int, sectors: float = 1.1) -> None:
    assert floor <= traffic.bytes <= MOST * floor
    assert traffic.sectors * 32 <= sectors * floor
    assert traffic.bytes / traffic.requests >= 256


def test_requests_of_a_sliced_gradient_are_wide():
    """Rows that lie otherwise in the logits than in the gradient: each load is two, of 16 bytes."""
    logits = torch.randn(2, 3, 50257).bfloat16()[:, 1:]
    ids = torch.randint(0, 50257, (2, 2, 1))
    saved = (logits, ids, None, None, torch.zeros(2, 2).double(), torch.zeros(2, 2), 1.0, 0.0)
    loads, stores = _traffic(
        lambda kernels: kernels.token_logprobs_bwd(torch.zeros(2, 2, 1), None, *saved)
    )
    floor = logits.numel() * 2
    assert loads.bytes <= 2 * MOST * floor and loads.bytes / loads.requests >= 256
    _assert_streaming(stores, floor)
