"""The rule that judges accuracy sees small faults and does not hang on the reference's luck."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apt_kernels.calls import assert_results, call, fresh
from apt_kernels.registry import OPS
from apt_kernels.testing import assert_as_accurate, rounding_errors

aten = torch.ops.aten


class _Faulty(TorchDispatchMode):
    """Spoils the arguments or the result of one operator of PyTorch."""

    def __init__(self, packet, arguments=None, result=None):
        super().__init__()
        self.packet, self.arguments, self.result = packet, arguments, result
        self.spoiled = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ours = function.overloadpacket is self.packet and args[0].is_floating_point()
        self.spoiled += ours
        if ours and self.arguments:
            args = self.arguments(*args)
        result = function(*args, **(kwargs or {}))
        return self.result(result) if ours and self.result else result


def _without_the_last_term(x, dims=None, *rest):
    x = x.clone()
    (x.flatten() if dims is None else x)[..., -1:] = 0
    return (x, *rest) if dims is None else (x, dims, *rest)


def _rounded_to(dtype):
    return lambda x: x.to(dtype).to(x.dtype)


FAULTS = {
    "sum_in_bfloat16": (aten.sum, None, _rounded_to(torch.bfloat16)),
    "sum_in_float16": (aten.sum, None, _rounded_to(torch.float16)),
    "term_dropped": (aten.sum, _without_the_last_term),
    "logits_in_bfloat16": (aten.mm, None, _rounded_to(torch.bfloat16)),
    "logits_in_float16": (aten.mm, None, _rounded_to(torch.float16)),
    "product_of_bfloat16": (aten.mm, lambda *xs: [_rounded_to(torch.bfloat16)(x) for x in xs]),
    "wrong_eps": (aten.rsqrt, lambda x: (x + 1e-4,)),
    "probabilities_in_bfloat16": (aten._log_softmax, None, _rounded_to(torch.bfloat16)),
    "division_by_one_more": (aten.div, lambda x, by: (x, by * (1 + 2e-5))),
}


FAULTY_CALLS = [
    (name, fault)
    for name in ("linear_cross_entropy", "linear_token_logprobs", "info_nce")
    for fault in FAULTS
    if fault != "wrong_eps" or name == "info_nce"  # it alone brings rows to unit length
]


@pytest.mark.parametrize("name, fault", FAULTY_CALLS)
def test_a_small_fault_is_seen(name, fault):
    """Here the reference with one step spoiled is judged, in float32."""
    op, step = OPS[name], FAULTS[fault]
    for sample in op.samples(torch.float32):
        with _Faulty(*step) as faulty:
            results = call(op.reference, fresh(sample))
        if faulty.spoiled:
            break
    else:
        pytest.fail("no sample takes this step")
    with pytest.raises(AssertionError, match="elements are beyond"):
        assert_results(op, sample, results)
    assert_results(op, sample, call(op.reference, fresh(sample)))


def test_a_lucky_reference_does_not_decide():
    """The sum is 1/4, of terms of about 1: any order of them is right to some units of 1."""
    terms = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    terms = torch.cat([terms, -terms.flip(0), torch.tensor([0.25])])
    exact = terms.double().sum()
    one_by_one = torch.zeros(())
    for term in terms[torch.randperm(len(terms), generator=torch.Generator().manual_seed(1))]:
        one_by_one = one_by_one + term
    lucky = exact.float()
    assert exact == 0.25 and one_by_one != lucky
    with pytest.raises(AssertionError, match="elements are beyond"):
        assert_as_accurate(one_by_one, lucky, exact)
    (change,) = rounding_errors(lambda: [terms.double().sum()])
    assert 0.1 < change / terms.norm() < 4
    assert_as_accurate(one_by_one, lucky, exact, rounding=lambda: change)
    with pytest.raises(AssertionError, match="elements are beyond"):
        assert_as_accurate(lucky + 1e-4, lucky, exact, rounding=lambda: change)


def test_an_exact_zero_stays_exact():
    x = torch.full((5,), 3.3, dtype=torch.float64)
    (change,) = rounding_errors(lambda: [x / 7 - (x / 7).mean()])
    assert change > 0
    zero = torch.zeros(5)
    assert_as_accurate(zero, zero, zero.double(), rounding=lambda: change)
    with pytest.raises(AssertionError, match="5 of 5 elements are beyond"):
        assert_as_accurate(zero + 1e-12, zero, zero.double(), rounding=lambda: change)


def test_decisions_are_those_of_the_exact_run():
    """A ratio on the bound of a clip, two equal logits: rounding would take the other branch."""
    x = torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64)

    def run():
        y = x / 3 * 3
        leaf = y.requires_grad_()
        (slope,) = torch.autograd.grad(leaf.clamp(max=3.0).relu().sum(), leaf)
        return [slope, (y == y.amax()).double(), y.argmax()]

    assert rounding_errors(run) == [0, 0, 0]
