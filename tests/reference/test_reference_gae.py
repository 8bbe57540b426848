"""The reference of the advantages against their definition as a sum of discounted deltas."""

import itertools
import math

import pytest
import torch

from apt_kernels import reference
from support.oracles import randn


def _gae_by_definition(r, v, gamma, lam, counts, ended, cut, after_last, after):
    """The advantages of one sequence as the sum of discounted deltas, forwards, in Python."""
    steps = [t for t in range(len(r)) if counts[t]]
    advantages = [0.0] * len(r)
    deltas, stops = {}, {}
    for i, t in enumerate(steps):
        last = i == len(steps) - 1
        if ended[t]:
            following = 0.0
        elif last or cut[t]:
            following = after[t] if after is not None else (after_last if last else 0.0)
        else:
            following = v[steps[i + 1]]
        deltas[t] = r[t] + gamma * following - v[t]
        stops[t] = last or ended[t] or cut[t]
    for i, t in enumerate(steps):
        for n, u in enumerate(steps[i:]):
            advantages[t] += (gamma * lam) ** n * deltas[u]
            if stops[u]:
                break
    return advantages, [a + v[t] if counts[t] else 0.0 for t, a in enumerate(advantages)]


def _all_flags(length):
    kinds = list(itertools.product((False, True), repeat=3))
    table = torch.tensor(list(itertools.product(kinds, repeat=length)))
    return table[..., 0], table[..., 1], table[..., 2]


@pytest.mark.parametrize("shape_of_bootstrap", ["none", "one a row", "one a step"])
def test_gae_over_all_flags(shape_of_bootstrap):
    mask, terminated, truncated = _all_flags(3)
    rows = len(mask)
    rewards, values = randn(rows, 3, grad=False), randn(rows, 3, grad=False)
    bootstrap = {
        "none": None, "one a row": randn(rows, grad=False), "one a step": randn(rows, 3, grad=False)
    }[shape_of_bootstrap]  # fmt: skip
    options = dict(gamma=0.9, gae_lambda=0.8)
    flags = dict(mask=mask, terminated=terminated, truncated=truncated, bootstrap=bootstrap)
    expected = []
    for i in range(rows):
        after = bootstrap[i].tolist() if shape_of_bootstrap == "one a step" else None
        after_last = bootstrap[i].item() if shape_of_bootstrap == "one a row" else 0.0
        sequence = (rewards[i].tolist(), values[i].tolist(), 0.9, 0.8)
        marks = (mask[i].tolist(), terminated[i].tolist(), truncated[i].tolist())
        expected.append(_gae_by_definition(*sequence, *marks, after_last, after))
    expected = torch.tensor(expected, dtype=torch.float64)
    nan = torch.tensor(math.nan).double()
    spoiled = [torch.where(mask, x, nan) for x in (rewards, values)]
    if shape_of_bootstrap == "one a step":
        flags["bootstrap"] = torch.where(mask, bootstrap, nan)
    advantages, returns = reference.gae(*spoiled, **options, **flags)
    torch.testing.assert_close(advantages, expected[:, 0])
    torch.testing.assert_close(returns, expected[:, 1])

    def turned(x):
        return x.mT if x is not None and x.dim() == 2 else x

    turned_flags = {name: turned(x) for name, x in flags.items()}
    by_time = reference.gae(
        turned(spoiled[0]), turned(spoiled[1]), time_major=True, **options, **turned_flags
    )
    assert torch.equal(by_time[0].mT, advantages) and torch.equal(by_time[1].mT, returns)

    packed_flags = {
        name: x.flatten() if x is not None and x.dim() == 2 else x for name, x in flags.items()
    }
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * 3
    packed = reference.gae(
        spoiled[0].flatten(), spoiled[1].flatten(), cu_seqlens=cu_seqlens, **options, **packed_flags
    )
    assert torch.equal(packed[0], advantages.flatten())
    assert torch.equal(packed[1], returns.flatten())


def test_gae_of_uneven_packed_sequences():
    lengths = [3, 0, 1, 5, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    rewards, values = randn(9, grad=False), randn(9, grad=False)
    bootstrap = randn(5, grad=False)
    got = reference.gae(rewards, values, cu_seqlens=cu_seqlens, bootstrap=bootstrap)
    for i, length in enumerate(lengths):
        part = slice(int(cu_seqlens[i]), int(cu_seqlens[i]) + length)
        expected = reference.gae(
            rewards[None, part], values[None, part], bootstrap=bootstrap[i : i + 1]
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[part], b[0])


def test_gae_whitening_counts_only_what_counts():
    rewards, values = randn(4, 6, grad=False), randn(4, 6, grad=False)
    mask = torch.rand(4, 6) > 0.4
    raw, returns = reference.gae(rewards, values, mask=mask)
    white, same_returns = reference.gae(rewards, values, mask=mask, whiten=True)
    chosen = raw[mask]
    torch.testing.assert_close(
        white[mask], (chosen - chosen.mean()) / torch.sqrt(chosen.var() + 1e-8)
    )
    assert (white[~mask] == 0).all() and torch.equal(returns, same_returns)
    one = torch.zeros(4, 6).bool()
    one[2, 3] = True
    for few in (one, torch.zeros(4, 6).bool()):
        assert (reference.gae(rewards, values, mask=few, whiten=True)[0] == 0).all()


def test_gae_odd_shapes_and_no_gradient():
    values = torch.randn(2, 1, requires_grad=True)
    advantages, _ = reference.gae(torch.ones(2, 1), values, bootstrap=torch.tensor([0.5, 1.0]))
    assert not advantages.requires_grad
    torch.testing.assert_close(
        advantages, 1 + 0.99 * torch.tensor([[0.5], [1.0]]) - values.detach()
    )
    for shape in ((0, 3), (3, 0)):
        assert reference.gae(torch.zeros(shape), torch.zeros(shape), whiten=True)[0].shape == shape
    long = torch.randn(2, 2000, dtype=torch.float64)
    advantages, _ = reference.gae(long, long, gamma=1.0, gae_lambda=1.0)
    expected = long.flip(-1).cumsum(-1).flip(-1) - long  # Monte-Carlo returns minus values
    torch.testing.assert_close(advantages, expected)
