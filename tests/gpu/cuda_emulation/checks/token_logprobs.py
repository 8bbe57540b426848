"""token_logprobs: every alignment, stride, mask and value that a row can have."""

from __future__ import annotations

import functools
import mmap

import torch
from torch import Tensor

from apt_kernels import reference
from apt_kernels.testing import assert_as_accurate

from .registry import FLOATS, check, randint, randn


def check_token_logprobs(
    kernels, logits, token_ids, mask=None, temperatures=None, temperature=1.0, softcap=0.0
) -> None:
    """Values, entropy, lse and the gradient of both for a random upstream gradient."""
    before = logits.clone()
    forward = (logits, token_ids, mask, temperatures, temperature, softcap)
    logps, entropy, lse = kernels.token_logprobs_fwd(*forward, True)
    without, none, lse_again = kernels.token_logprobs_fwd(*forward, False)
    assert none.numel() == 0
    for one, other in ((logps, without), (lse, lse_again)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)

    upstream = randn(*logps.shape, seed=2), randn(*entropy.shape, seed=3)
    wanted = _expected(torch.float64, *forward, upstream)
    plain = _expected(torch.float32, *forward, upstream)
    for name, result in (("logps", logps), ("entropy", entropy)):
        assert_as_accurate(result, plain[name], wanted[name], name)
    options = (logits, token_ids, mask, temperatures, lse, entropy, temperature, softcap)
    both = kernels.token_logprobs_bwd(*upstream, *options)
    _assert_gradient(both, "grad", plain, wanted)
    of_logps = kernels.token_logprobs_bwd(upstream[0], None, *options)
    _assert_gradient(of_logps, "grad of logps", plain, wanted)

    exact = wanted["lse"] if mask is None else wanted["lse"].where(mask, 0)
    top, log_sum = lse.view(torch.float32).unflatten(-1, (-1, 2)).double().unbind(-1)
    by = temperature if temperatures is None else temperatures.double()
    wrong = (top / by + log_sum - exact).abs() > 1e-6 * (1 + exact.abs())
    assert not wrong[exact.isfinite()].any(), "lse"
    if mask is not None:
        for result in (logps, entropy, lse, both, of_logps):
            assert (result[~mask] == 0).all(), "masked rows are not exactly 0"
    assert torch.equal(before.nan_to_num(1.5), logits.nan_to_num(1.5)), "the logits were changed"


def _assert_gradient(actual: Tensor, name: str, plain: dict, wanted: dict) -> None:
    """As `assert_as_accurate`, less 4 float32 units of the terms that cancel in p (G + ge (l + H)).

    One such unit is what rounding the sum of exponentials costs, in any implementation.
    """
    exact = wanted[name]
    slack = 4 * torch.finfo(torch.float32).eps * wanted["terms"].nan_to_num(0, 0, 0)
    error = actual.double() - exact
    shrunk = exact + error.sign() * (error.abs() - slack).clamp_min(0)
    judged = torch.where(exact.isfinite() & actual.isfinite(), shrunk.to(actual.dtype), actual)
    assert_as_accurate(judged, plain[name], exact, name)


def _expected(dtype, logits, token_ids, mask, temperatures, temperature, softcap, upstream) -> dict:
    """What the reference gives in `dtype`; NaN at ids out of range, which have no gradient."""
    leaf = logits.detach().clone() if dtype == torch.float32 else logits.detach().to(dtype)
    leaf.requires_grad_()
    ids = token_ids.clamp(0, logits.shape[-1] - 1)
    counted = ids == token_ids if mask is None else (ids == token_ids) | ~mask.unsqueeze(-1)
    by = temperature if temperatures is None else temperatures.to(dtype)
    logps, entropy = reference.token_logprobs(
        leaf, ids, temperature=by, mask=mask, softcap=softcap or None, return_entropy=True
    )
    result = {"logps": logps.detach().masked_fill(~counted, torch.nan), "entropy": entropy.detach()}
    grad_logps, grad_entropy = upstream[0].to(dtype), upstream[1].to(dtype)
    ends = (logps * counted, entropy)
    for name, of_entropy in (("grad", grad_entropy), ("grad of logps", 0 * grad_entropy)):
        starts = (grad_logps, of_entropy)
        (result[name],) = torch.autograd.grad(ends, leaf, starts, retain_graph=True)
    return result | _sizes(leaf.detach().to(dtype), result, mask, by, softcap, upstream)


def _sizes(x, result, mask, by, softcap, upstream) -> dict:
    """lse, and the sum of the absolute values of the terms of a column's gradient."""
    x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
    if softcap:
        x = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
    by = by.unsqueeze(-1) if isinstance(by, Tensor) else by
    log_probs = (x / by).log_softmax(-1)
    grad_logps, grad_entropy = upstream[0].abs().sum(-1, True), upstream[1].abs().unsqueeze(-1)
    logp = log_probs.abs().nan_to_num(0, 0, 0)
    pull = grad_logps + grad_entropy * (logp + result["entropy"].abs().unsqueeze(-1))
    return {"lse": (x / by).logsumexp(-1), "terms": log_probs.exp() * pull / by}


# ---------------------------------------------------------------- sizes and alignments


def _vocabulary(kernels, vocab: int, dtype: torch.dtype) -> None:
    rows = 2 if vocab > 10_000 else 5
    logits = randn(1, rows, vocab, seed=vocab, scale=3).to(dtype)
    ids = torch.full((1, rows, 2), vocab - 1)  # the last column
    ids[..., 1] = randint(1, rows, below=vocab)
    check_token_logprobs(kernels, logits, ids)


def _alignments(kernels, vocab: int, dtype: torch.dtype) -> None:
    """Every alignment of the logits' rows against every alignment of the gradient's."""
    for offset in range(16 // dtype.itemsize):
        for stride in (vocab, vocab + 1):
            end = offset + 7 * stride + vocab
            storage = randn(end + 16, seed=offset, scale=2).to(dtype)
            storage[end:] = torch.nan  # what lies behind the last row must not count
            storage[:offset] = torch.nan
            logits = storage.as_strided((1, 8, vocab), (0, stride, 1), offset)
            check_token_logprobs(kernels, logits, randint(1, 8, 1, below=vocab))


def _exact_buffers(kernels, dtype: torch.dtype) -> None:
    """The row ends where its memory ends: AddressSanitizer sees one element more."""
    for offset in range(16 // dtype.itemsize):
        logits = randn(offset + 77).to(dtype)[offset:].view(1, 1, 77)
        check_token_logprobs(kernels, logits, randint(1, 1, 1, below=77))


for _name, _dtype in FLOATS.items():
    _size = 16 // _dtype.itemsize
    for _vocab in (1, 2, _size - 1, _size, _size + 1, 31, 127, 1000, 2053, 50257):
        _check = functools.partial(_vocabulary, vocab=_vocab, dtype=_dtype)
        check(f"vocabulary_{_vocab}-{_name}")(_check)
    for _vocab in (3 * _size + 1, 517, 640):
        _check = functools.partial(_alignments, vocab=_vocab, dtype=_dtype)
        check(f"alignments_{_vocab}-{_name}")(_check)
    check(f"exact_buffers-{_name}")(functools.partial(_exact_buffers, dtype=_dtype))


# ---------------------------------------------------------------- rows


@check()
def strides(kernels):
    wide = randn(4, 7, 60, scale=2)
    ids = randint(4, 7, 1, below=40)
    check_token_logprobs(kernels, wide[:, 1:], ids[:, 1:].contiguous())
    check_token_logprobs(kernels, wide.transpose(0, 1), ids.transpose(0, 1).contiguous())
    check_token_logprobs(kernels, wide[:1].expand(4, 7, 60), ids)
    check_token_logprobs(kernels, wide[:, :1].expand(4, 7, 60), ids)
    check_token_logprobs(kernels, wide[..., 5:46], ids)


@check()
def wide_strides(kernels):
    """Strides of 2**31 and of 2**32 + 64 elements, which lose their upper half in an int."""
    storage = _sparse_float16((1 << 33) + 1024)
    for stride in (1 << 31, (1 << 32) + 64):
        logits = storage.as_strided((2, 2, 50), (stride, 200, 1), 1 << 31)
        logits.copy_(randn(2, 2, 50, seed=stride % 1000))
        check_token_logprobs(kernels, logits, randint(2, 2, 1, below=50))


def _sparse_float16(elements: int) -> Tensor:
    """Zeros of which the system gives memory only where something is written."""
    no_reserve = 0x4000
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.float16)


@check(small=True)
def several_warps(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        ids = torch.tensor([[[0, 600, 600], [1300, 3, 3], [5, 6, 7]]])
        mask = torch.tensor([[True, True, False]])
        wide = randn(1, 3, 1304).to(dtype)
        for logits in (wide, wide[..., 1:1302]):  # the second one with shifted loads
            check_token_logprobs(kernels, logits, ids, mask)


@check()
def many_rows(kernels):
    check_token_logprobs(kernels, randn(17, 9, 3), randint(17, 9, 2, below=3))


@check()
def no_rows(kernels):
    for shape in ((0, 3), (3, 0)):
        logits, ids = torch.empty(*shape, 5), torch.empty(*shape, 1, dtype=torch.long)
        check_token_logprobs(kernels, logits, ids)


@check()
def rows_do_not_depend_on_each_other(kernels):
    logits, ids = randn(2, 3, 1500), randint(2, 3, 2, below=1500)
    together = kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)
    alone = kernels.token_logprobs_fwd(logits[1:, 2:], ids[1:, 2:], None, None, 1.0, 0.0, True)
    for all_rows, row in zip(together, alone):
        assert torch.equal(all_rows[1:, 2:], row)


# ---------------------------------------------------------------- masks and ids


@check()
def mask(kernels):
    for dtype in FLOATS.values():
        logits, ids = randn(3, 5, 37).to(dtype), randint(3, 5, 2, below=37)
        mask = randint(3, 5, below=2, seed=9).bool()
        logits[~mask] = torch.nan
        ids[~mask] = torch.tensor([-100, 1 << 40])
        temperatures = torch.where(mask, randint(3, 5, below=3, seed=4) + 0.5, torch.nan)
        check_token_logprobs(kernels, logits, ids, mask)
        check_token_logprobs(kernels, logits, ids, mask, temperatures)
        check_token_logprobs(kernels, logits, ids, torch.zeros_like(mask))
        check_token_logprobs(kernels, logits.nan_to_num(), randint(3, 5, 2, below=37), mask)


@check()
def wild_ids(kernels):
    ids = randint(2, 3, 4, below=50)
    ids[0, 0, 1], ids[1, 2, 0], ids[1, 2, 3], ids[1, 1, 2] = -1, 50, 1 << 40, -100
    check_token_logprobs(kernels, randn(2, 3, 50), ids)


@check()
def several_ids(kernels):
    for count in (0, 1, 3, 40):
        check_token_logprobs(kernels, randn(2, 3, 19), randint(2, 3, count, below=19))
    check_token_logprobs(kernels, randn(2, 3, 700), torch.full((2, 3, 35), 7))


# ---------------------------------------------------------------- values


@check()
def excluded_columns(kernels):
    for dtype in FLOATS.values():
        logits = randn(1, 5, 70, scale=2).to(dtype)
        logits[..., 61:] = -torch.inf
        logits[0, 1, :33] = -torch.inf
        logits[0, 2, :60] = -torch.inf  # one column is left
        logits[0, 3] = -torch.inf  # none
        ids = torch.tensor([0, 40, 60, 5, 65]).view(1, 5, 1)
        check_token_logprobs(kernels, logits, ids)
        check_token_logprobs(kernels, logits, ids, temperature=1.7, softcap=3.0)


@check()
def infinite_and_nan_logits(kernels):
    logits = randn(1, 5, 1100)
    logits[0, 1, 30] = torch.nan
    logits[0, 2, 1099] = torch.inf
    logits[0, 3] = torch.nan
    check_token_logprobs(kernels, logits, randint(1, 5, 1, below=1100))


@check()
def large_logits(kernels):
    logits = randn(1, 4, 3000, scale=10) + 1e4
    ids = logits.argmax(-1, keepdim=True)
    check_token_logprobs(kernels, logits, ids)
    check_token_logprobs(kernels, -logits, ids)
    check_token_logprobs(kernels, logits * 1e30, ids)
    check_token_logprobs(kernels, logits, ids, temperature=0.07)
    rising = torch.linspace(-80, 80, 3000).expand(1, 2, 3000).contiguous()
    ids = randint(1, 2, 1, below=999)
    check_token_logprobs(kernels, rising, ids)
    check_token_logprobs(kernels, rising.flip(-1), ids)
    check_token_logprobs(kernels, torch.full((1, 2, 999), 80.0), ids)


@check()
def temperature_and_softcap(kernels):
    for dtype in FLOATS.values():
        logits, ids = randn(2, 3, 200, scale=8).to(dtype), randint(2, 3, 1, below=200)
        rows = torch.linspace(0.05, 3, 6).view(2, 3)
        for softcap in (0.0, 4.0, 30.0):
            check_token_logprobs(kernels, logits, ids, softcap=softcap)
            check_token_logprobs(kernels, logits, ids, temperature=0.6, softcap=softcap)
            check_token_logprobs(kernels, logits, ids, temperatures=rows, softcap=softcap)
