"""What the registry cannot say of the losses over an output head."""

from __future__ import annotations

import pytest
import torch

import apt_kernels
from apt_kernels import reference
from apt_kernels.calls import fresh, in_float64
from apt_kernels.registry import Sample
from apt_kernels.registry.common.heads import hidden_and_weight
from apt_kernels.registry.policy.linear_policy_loss import ARGUMENTS, tokens
from apt_kernels.registry.preference.linear_dpo_loss import _pairs
from apt_kernels.testing import assert_as_accurate


def _policy(dtype: torch.dtype, rows: int = 4, length: int = 9) -> tuple:
    x = tokens(rows, length, dtype)
    return tuple(x[n] for n in ARGUMENTS)


def _gradients(function, args: tuple, upstream: float, **kwargs) -> list[torch.Tensor]:
    loss = function(*args, **kwargs)[0]
    return torch.autograd.grad(loss, args[:2], torch.tensor(upstream, dtype=loss.dtype))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("upstream", [65536.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_too_small_for_float16_survive_loss_scaling(dtype, upstream, level):
    args = _policy(dtype)
    options = {"normalizer": 1e6, "ratio_level": level}
    got = _gradients(apt_kernels.linear_policy_loss, args, upstream, **options)
    exact = in_float64(fresh(Sample("", args)))
    wanted = _gradients(reference.linear_policy_loss, exact.args, upstream, **options)
    for g, w in zip(got, wanted, strict=True):
        eps = torch.finfo(dtype).eps
        least = torch.finfo(dtype).tiny * eps  # the smallest subnormal number
        bound = 4 * eps * w.abs().max() + 2 * least
        assert (g.double() - w).abs().max() <= bound
        large = w.abs() > 10 * least
        assert (g[large] != 0).all() and (large.any() or abs(upstream) < 1e4)


def test_on_policy_ratios_are_one():
    """The old log-probabilities of the same weights, in float32: nothing is clipped."""
    hidden, weight, ids, _, advantages, mask = _policy(torch.float32)
    old = apt_kernels.linear_token_logprobs(hidden.detach(), weight.detach(), ids)
    _, metrics = apt_kernels.linear_policy_loss(hidden, weight, ids, old, advantages, mask)
    assert metrics["approx_kl"] < 1e-12 and metrics["clip_fraction"] == 0
    assert metrics["ppo_kl"].abs() < 1e-6


def test_results_do_not_depend_on_the_number_of_threads():
    args = _policy(torch.float32, 8, 40)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss, _ = apt_kernels.linear_policy_loss(*args)
        results.append((loss, *torch.autograd.grad(loss, args[:2])))
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_no_gradient_without_need(trained):
    args = [t.detach() if torch.is_tensor(t) else t for t in _policy(torch.float32)]
    index = ("hidden", "weight").index(trained)
    args[index].requires_grad_()
    loss, metrics = apt_kernels.linear_policy_loss(*args)
    loss.backward()
    assert args[index].grad is not None and args[1 - index].grad is None
    with torch.no_grad():
        plain, _ = apt_kernels.linear_policy_loss(*args)
    assert not plain.requires_grad and torch.equal(plain, loss.detach())
    assert not any(m.requires_grad for m in metrics.values())


def test_policy_module_is_the_function():
    options = {"clip_high": 0.28, "entropy_coef": 0.1, "aggregation": "dr_grpo"}
    args = _policy(torch.float32)
    module = apt_kernels.LinearPolicyLoss("clip", **options)
    loss, metrics = module(*args, temperature=0.8)
    wanted, wanted_metrics = apt_kernels.linear_policy_loss(*args, temperature=0.8, **options)
    assert torch.equal(loss, wanted) and metrics == wanted_metrics
    assert "clip_high=0.28" in repr(module)
    with pytest.raises(ValueError, match="loss_type"):
        apt_kernels.LinearPolicyLoss("ppo")


def test_dpo_module_is_the_function():
    args = _pairs(3, 5, torch.float32)
    module = apt_kernels.LinearDPOLoss(0.3, loss_type="ipo", average=True)
    wanted = apt_kernels.linear_dpo_loss(*args, beta=0.3, loss_type="ipo", average=True, softcap=9)
    for got, want in zip(module(*args, softcap=9), wanted, strict=True):
        assert torch.equal(got, want)


def test_dpo_of_hidden_states_is_dpo_of_logits():
    hidden, weight, ids, mask, *refs = _pairs(3, 5, torch.float32)
    logits = hidden @ weight.T
    logps = apt_kernels.sequence_logps(apt_kernels.token_logprobs(logits, ids, mask=mask), mask)
    wanted = apt_kernels.dpo_loss(logps[:3], logps[3:], *refs)
    got = apt_kernels.linear_dpo_loss(hidden, weight, ids, mask, *refs)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_a_batch_of_upstream_gradients():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    ids, old, mask = torch.randint(11, (2, 5)), torch.randn(2, 5) - 2, torch.ones(2, 5).bool()
    for loss in (
        lambda x: apt_kernels.linear_cross_entropy(x, weight, ids),
        lambda x: apt_kernels.linear_policy_loss(x, weight, ids, old, torch.ones(2), mask)[0],
    ):
        one_by_one = torch.autograd.functional.jacobian(loss, hidden)
        at_once = torch.autograd.functional.jacobian(loss, hidden, vectorize=True)
        torch.testing.assert_close(at_once, one_by_one)


@pytest.mark.parametrize(
    "backend", apt_kernels.backends()["operations"]["linear_cross_entropy"]["cpu"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_scale_saves_the_digits_of_float16(reduction, backend):
    """The mean of many tokens has gradients of 1e-8: the scaler's factor must come before they are
    rounded, as in plain PyTorch."""
    hidden, weight = hidden_and_weight(24, features=16, vocab=50, dtype=torch.float16)
    labels = torch.arange(24) * 7 % 50
    labels[3] = -100
    options = {"reduction": reduction}
    if reduction == "mean":
        options["normalizer"] = 2.0**18
    upstream = torch.tensor(2.0**16 if reduction == "mean" else 2.0**-12)

    def grads(function, *leaves, **named):
        leaves = [t.detach().requires_grad_() for t in leaves]
        loss = function(*leaves, labels, **options, **named)
        return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))

    got = grads(apt_kernels.linear_cross_entropy, hidden, weight, backend=backend)
    plain = reference.linear_cross_entropy
    exact = grads(plain, hidden.double(), weight.double())
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == torch.float16
        assert (one.double() - other).norm() <= 6e-4 * other.norm()
    for nothing in (0.0, -upstream):
        upstream = torch.as_tensor(nothing)
        for one, other in zip(got, grads(apt_kernels.linear_cross_entropy, hidden, weight,
                                         backend=backend), strict=True):  # fmt: skip
            assert torch.equal(other, torch.zeros_like(one) if nothing == 0 else -one)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_than_a_group_of_the_cpu_kernels(dtype, frozen):
    """Rows are taken in groups of a fixed size in bytes: so wide that 256 of them make one. The
    gradient of a 16-bit weight is then formed tile by tile, from all groups."""
    hidden, weight = hidden_and_weight(301, features=8201, vocab=601, dtype=dtype)
    if frozen:
        weight = weight.detach()
    ids = torch.arange(301) * 599 % 601
    sample = Sample("", (hidden, weight, ids), {"mask": torch.arange(301) % 7 != 3})
    leaves = [t for t in sample.args[:2] if t.requires_grad]
    logps = apt_kernels.linear_token_logprobs(*sample.args, **sample.kwargs)
    upstream = torch.linspace(-1, 1, 301)
    got = [logps, *torch.autograd.grad(logps, leaves, upstream)]

    def plain(sample: Sample) -> list[torch.Tensor]:
        logps = reference.linear_token_logprobs(*sample.args, **sample.kwargs)
        leaves = [t for t in sample.args[:2] if t.requires_grad]
        return [logps, *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))]

    for name, *values in zip(
        ("logps", "gradient 0", "gradient 1"), got, plain(fresh(sample)),
        plain(in_float64(fresh(sample))), strict=False,
    ):  # fmt: skip
        assert_as_accurate(*values, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_with_a_nan_logit_is_not_correct(dtype):
    hidden, weight = hidden_and_weight(8, features=12, vocab=1500, dtype=dtype)
    labels = (hidden @ weight.T).argmax(-1)
    weight = weight.detach().clone()
    weight[(labels.max() + 1) % 1500] = torch.nan
    loss, correct = apt_kernels.linear_cross_entropy(hidden, weight, labels, return_correct=True)
    assert loss.isnan() and correct == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs", "linear_policy_loss"])
def test_a_wrong_temperature_of_a_row_is_an_error(name, bad):
    logits, hidden, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(8, 4)
    ids, temperature = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    temperature[1, 0] = bad
    mask = torch.ones(2, 3, dtype=torch.bool)

    def call(mask):
        if name == "linear_policy_loss":
            args = hidden, weight, ids, torch.zeros(2, 3), torch.ones(2), mask
        elif name == "linear_token_logprobs":
            args = hidden, weight, ids
        else:
            args = logits, ids
        named = {} if name == "linear_policy_loss" else {"mask": mask}
        found = getattr(apt_kernels, name)(*args, temperature=temperature, **named)
        return found[0] if isinstance(found, tuple) else found

    with pytest.raises(ValueError, match=r"temperature: .*above 0 .*in row 3"):
        call(mask)
    mask[1, 0] = False
    assert call(mask).isfinite().all()
