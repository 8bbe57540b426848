"""Numbers that are not finite reach no result they take no part in, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import apt_kernels

BACKENDS = apt_kernels.backends()["operations"]["policy_loss"]["cpu"]
INF, NAN = math.inf, math.nan
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _policy(backend, **options):
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = apt_kernels.policy_loss(
        logps, logps.detach(), torch.ones(1), torch.ones(1, 2), backend=backend, **options
    )
    loss.backward()
    return loss.item(), logps.grad.tolist()


def _linear(backend, **options):
    hidden = torch.eye(4)[None, :2].clone().requires_grad_()
    loss, _ = apt_kernels.linear_policy_loss(
        hidden, torch.eye(5, 4), torch.tensor([[0, 1]]), torch.full((1, 2), -1.0), torch.ones(1),
        torch.ones(1, 2), backend=backend, **options,
    )  # fmt: skip
    loss.backward()
    return loss.item(), hidden.grad.tolist()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "unbiased_k3"])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("run", [_policy, _linear])
@each_backend
def test_a_kl_of_coefficient_0_takes_no_part(backend, run, value, estimator):
    named = {"ref_logps": torch.tensor([[value, -1.0]]), "kl_estimator": estimator}
    assert run(backend, kl_coef=0.0, **named) == run(backend)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@each_backend
def test_an_entropy_of_coefficient_0_takes_no_part(backend, value):
    entropy = torch.tensor([[value, 1.0]])
    assert _policy(backend, entropy=entropy, entropy_coef=0.0) == _policy(backend)


@pytest.mark.parametrize(
    "aggregation", ["token_mean", "token_sum", "sequence_mean", "sequence_sum", "dr_grpo"]
)
@each_backend
def test_a_float64_normalizer_leaves_the_dtype(backend, aggregation):
    two = torch.tensor(2.0, dtype=torch.float64)
    tokens = torch.ones(1, 2)
    named = {"aggregation": aggregation, "normalizer": two, "backend": backend}
    loss, metrics = apt_kernels.policy_loss(tokens, tokens, tokens, tokens, **named)
    assert {loss.dtype, *(m.dtype for m in metrics.values())} == {torch.float32}
    loss, metrics = apt_kernels.value_loss(tokens, tokens, tokens, **named)
    assert {loss.dtype, *(m.dtype for m in metrics.values())} == {torch.float32}
    loss = apt_kernels.linear_cross_entropy(
        tokens, torch.ones(3, 2), torch.tensor([0]), normalizer=two, backend=backend
    )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@each_backend
def test_whitening_leaves_out_masked_steps(backend, value):
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])

    def run(masked):
        steps = torch.arange(8.0).view(2, 4).masked_fill(mask == 0, masked)
        return apt_kernels.gae(steps, steps, mask=mask, whiten=True, backend=backend)

    for got, wanted in zip(run(value), run(0.0), strict=True):
        assert torch.equal(got, wanted) and not got[mask == 0].any()


@each_backend
def test_whitening_tells_that_a_step_that_counts_is_not_a_number(backend):
    """Masked steps stay 0; the mean of the others is unknown."""
    mask = torch.tensor([[1, 0, 1]])
    steps = torch.tensor([[1.0, 5.0, NAN]])
    advantages, _ = apt_kernels.gae(steps, steps, mask=mask, whiten=True, backend=backend)
    assert advantages[mask == 1].isnan().all() and advantages[0, 1] == 0
