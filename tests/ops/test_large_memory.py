"""Results of 32 MiB and more: kept for the next call, never two tensors in one place."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import apt_kernels

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or apt_kernels.backends()["native"].startswith("absent"),
    reason="memory is kept by the C++ kernels, on Linux",
)
ROWS, VOCAB = 64, 140_000  # 34 MiB


def gradient(rows: int = ROWS) -> torch.Tensor:
    x = torch.zeros(rows, VOCAB, requires_grad=True)
    logps = apt_kernels.token_logprobs(x, torch.ones(rows, dtype=torch.long))
    return torch.autograd.grad(logps.sum(), x)[0]


def test_a_freed_gradient_is_the_next_one():
    apt_kernels.empty_cache()
    first = gradient()
    place = first.data_ptr()
    del first
    second = gradient()
    assert second.data_ptr() == place
    torch.testing.assert_close(second[:, 1], torch.full((ROWS,), 1 - 1 / VOCAB))
    torch.testing.assert_close(second[:, 2], torch.full((ROWS,), -1 / VOCAB))


def test_gradients_alive_together_do_not_share_memory():
    one, two = gradient(), gradient()
    assert abs(one.data_ptr() - two.data_ptr()) >= one.nbytes
    one.zero_()
    assert two[0, 1] > 0.9


def test_a_view_keeps_its_memory():
    row = gradient()[3]
    gradient().zero_()
    assert row[1] > 0.9


def test_empty_cache_gives_back_what_was_kept():
    apt_kernels.empty_cache()
    kept = gradient()
    assert apt_kernels.empty_cache() == 0  # still in use
    size = kept.nbytes
    del kept
    assert size <= apt_kernels.empty_cache() < size + 2**21
    assert apt_kernels.empty_cache() == 0


def test_only_the_last_block_is_kept_and_a_much_smaller_call_does_not_pin_it():
    apt_kernels.empty_cache()
    big, small = gradient(4 * ROWS), gradient()
    del small, big  # the last one freed stays
    place = gradient().data_ptr()  # a quarter of it: the big block is given back
    assert apt_kernels.empty_cache() < 2 * ROWS * VOCAB * 4
    assert place


def test_a_large_gradient_keeps_its_size_and_its_clone_does_not():
    with pytest.raises(RuntimeError, match="not resizable"):
        gradient().resize_(ROWS + 8, VOCAB)
    clone = gradient().clone().resize_(ROWS + 8, VOCAB)
    torch.testing.assert_close(clone[:ROWS, 1], torch.full((ROWS,), 1 - 1 / VOCAB))


def test_a_forked_process_has_its_own_copy():
    apt_kernels.empty_cache()
    mine = gradient()
    child = os.fork()
    if child == 0:
        mine.zero_()
        os._exit(0)
    os.waitpid(child, 0)
    assert mine[0, 1] > 0.9
