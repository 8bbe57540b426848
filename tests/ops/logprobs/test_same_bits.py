"""A row has the same bits alone, in any batch, on any number of threads, beside any padding.

So a policy's log-probabilities do not depend on whom a sequence shares its batch with.
"""

from __future__ import annotations

import pytest
import torch

import apt_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, VOCAB = 301, 1500  # more than a tile's rows and columns, and a remainder of every strip
# Rows by themselves, odd numbers of them, and on both sides of the limits of a tile of 256 rows.
PARTS = [(0, 1), (300, 301), (17, 20), (3, 36), (100, 115), (250, 263), (0, 256), (1, 301)]


def _head(dtype: torch.dtype, features: int = 70) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, features, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, features, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    ids = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, bias, ids


def _assert_same_bits(actual, wanted):
    for a, w in zip(actual, wanted, strict=True):
        assert torch.isfinite(w).all() and torch.equal(a, w), (a - w).abs().max()


@pytest.fixture
def threads():
    """Sets PyTorch's threads, and back to one after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("features", [70, 300, 512])  # one sum a product, two, and rows apart
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_head_alone_and_in_batches(dtype, features):
    hidden, weight, bias, ids = _head(dtype, features)
    options = {"softcap": 30.0, "logit_scale": 0.7, "temperature": 1.3, "return_entropy": True}

    def of(rows):
        return apt_kernels.linear_token_logprobs(
            hidden[rows], weight, ids[rows], bias=bias, **options
        )

    whole = of(slice(None))
    for first, last in PARTS:
        _assert_same_bits(of(slice(first, last)), [x[first:last] for x in whole])
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    _assert_same_bits(of(shuffled), [x[shuffled] for x in whole])


@pytest.mark.parametrize("trained", ["nothing", "hidden", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_head_on_threads_and_with_gradients(dtype, trained, threads):
    hidden, weight, _, ids = _head(dtype)
    wanted = apt_kernels.linear_token_logprobs(hidden, weight, ids)
    hidden.requires_grad_(trained != "nothing")
    weight.requires_grad_(trained == "all")
    for count in range(1, 9):
        threads(count)
        logps = apt_kernels.linear_token_logprobs(hidden, weight, ids)
        _assert_same_bits([logps.detach()], [wanted])


@pytest.mark.parametrize("left", [0, 1, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_head_beside_padding(dtype, left):
    hidden, weight, _, ids = _head(dtype)
    wanted = apt_kernels.linear_token_logprobs(hidden, weight, ids)
    losses = apt_kernels.linear_cross_entropy(hidden, weight, ids, reduction="none")
    _assert_same_bits([-losses], [wanted])
    padded = torch.full((ROWS + left + 5, hidden.shape[1]), torch.nan, dtype=dtype)
    padded[left : left + ROWS] = hidden
    labels = torch.full((len(padded),), -100)
    labels[left : left + ROWS] = ids
    counts = labels >= 0
    logps = apt_kernels.linear_token_logprobs(padded, weight, labels.clamp(0), mask=counts)
    _assert_same_bits([logps[counts]], [wanted])
    losses = apt_kernels.linear_cross_entropy(padded, weight, labels, reduction="none")
    _assert_same_bits([-losses[counts]], [wanted])
    assert not logps[~counts].any() and not losses[~counts].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rows_alone_and_in_batches(dtype):
    hidden, weight, _, ids = _head(dtype)

    def gradient(rows, train_weight):
        leaf = hidden[rows].clone().requires_grad_()
        head = weight.clone().requires_grad_(train_weight)
        apt_kernels.linear_token_logprobs(leaf, head, ids[rows]).sum().backward()
        return leaf.grad

    for train_weight in (False, True):
        whole = gradient(slice(None), train_weight)
        for first, last in PARTS:
            part = gradient(slice(first, last), train_weight)
            _assert_same_bits([part], [whole[first:last]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_16_bit_heads_are_not_rounded(dtype):
    """As by a head in float32 whose weights have the values of the 16 bits."""
    hidden, weight, _, ids = _head(dtype)
    logps = apt_kernels.linear_token_logprobs(hidden, weight, ids)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    wide = apt_kernels.linear_token_logprobs(hidden.float(), weight.float(), ids)
    assert logps.dtype == torch.float32
    bound = 2 * (wide - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (logps - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_logits(dtype, threads):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(67, 2500, generator=generator).to(dtype)
    ids = torch.randint(0, 2500, (67,), generator=generator)
    whole = apt_kernels.token_logprobs(logits, ids, return_entropy=True)
    for row in range(67):
        part = slice(row, row + 1)
        alone = apt_kernels.token_logprobs(logits[part], ids[part], return_entropy=True)
        _assert_same_bits(alone, [x[part] for x in whole])
    for count in range(1, 9):
        threads(count)
        _assert_same_bits(apt_kernels.token_logprobs(logits, ids, return_entropy=True), whole)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_beside_padding(dtype, average, threads):
    generator = torch.Generator().manual_seed(5)
    logps = -torch.rand(9, 700, generator=generator).to(dtype)
    mask = torch.rand(9, 700, generator=generator) > 0.3
    whole = apt_kernels.sequence_logps(logps, mask, average=average)
    for left, right in [(0, 0), (1, 0), (0, 1), (13, 300), (256, 7), (500, 500)]:
        padded = torch.nn.functional.pad(logps, (left, right), value=torch.nan)
        counts = torch.nn.functional.pad(mask, (left, right))
        for count in (1, 2, 8):
            threads(count)
            sums = apt_kernels.sequence_logps(padded, counts, average=average)
            _assert_same_bits([sums], [whole])
        alone = apt_kernels.sequence_logps(padded[4:5], counts[4:5], average=average)
        _assert_same_bits([alone], [whole[4:5]])
        columns = padded.T.contiguous().T
        _assert_same_bits([apt_kernels.sequence_logps(columns, counts, average=average)], [whole])
