"""Infinite log-probabilities and rewards: a loss and its gradient are their limits, never NaN."""

from __future__ import annotations

import math

import pytest
import torch

import apt_kernels
from apt_kernels import reference
from apt_kernels.registry.preference.dpo_loss import NORMALISED, TYPES, WITHOUT_REFERENCE

BACKENDS = apt_kernels.backends()["operations"]["dpo_loss"]["cpu"]
DTYPES = {"native": (torch.float32, torch.float64), "reference": (torch.float32, torch.float64)}
CASES = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in BACKENDS
    for dtype in DTYPES.get(backend, (torch.float32,))
]
# Each type as it is sampled, and without smoothing: 0 times an infinity
OPTIONS = {
    **TYPES,
    "sigmoid_plain": {"loss_type": "sigmoid"},
    "robust_plain": {"loss_type": "robust"},
    "aot_plain": {"loss_type": "aot"},
    "sigmoid_norm_plain": {"loss_type": "sigmoid_norm"},
    "simpo_plain": {"loss_type": "simpo"},
}


def _limits(function, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Where results go as the infinite inputs grow: float64 results of two large numbers."""
    near, far = (
        function(torch.where(inputs.isinf(), inputs.sign() * size, inputs).double())
        for size in (1e6, 1e9)
    )
    return [
        torch.where(f.abs() > 100 * n.abs() + 1, f.sign() * math.inf, f)
        for n, f in zip(near, far, strict=True)
    ]


def _results(loss_function, inputs, reduction):
    """The loss, and its gradients by the first two inputs."""
    leaves = [x.clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    loss = loss_function(leaves, reduction)
    grads = torch.autograd.grad(loss.sum(), leaves[:2])
    return [loss.detach(), *grads]


def _assert_limits(of, backend, inputs, dtype):
    inputs = torch.tensor(inputs)
    for reduction in ("none", "mean", "sum"):

        def results(x, on, reduction=reduction):
            return _results(lambda leaves, r: of(leaves, r, on), x, reduction)

        wanted = _limits(lambda x: results(x, None), inputs)
        got = results(inputs.to(dtype), backend)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)


def _places():
    for name, options in OPTIONS.items():
        has_none = options.get("loss_type", name) in WITHOUT_REFERENCE
        yield from ((name, place) for place in range(2 if has_none else 4))


@pytest.mark.parametrize("name, place", list(_places()))
@pytest.mark.parametrize("backend, dtype", CASES)
def test_dpo_loss(backend, dtype, name, place):
    options = {"loss_type": name, **OPTIONS[name]}
    inputs = [[-1.0] * 21, [-2.0] * 21, [-1.5] * 21, [-1.75] * 21]
    inputs[place][5] = -math.inf
    if options["loss_type"] in WITHOUT_REFERENCE:
        inputs = inputs[:2]
    if options["loss_type"] in NORMALISED:
        options |= {"chosen_lengths": torch.full((21,), 3), "rejected_lengths": torch.arange(21)}

    def of(leaves, reduction, on):
        function = reference.dpo_loss if on is None else apt_kernels.dpo_loss
        named = {} if on is None else {"backend": on}
        return function(*leaves, **options, reduction=reduction, **named)[0]

    _assert_limits(of, backend, inputs, dtype)


@pytest.mark.parametrize("center_coef", [0.0, 0.25])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("backend, dtype", CASES)
def test_bradley_terry_loss(backend, dtype, place, value, center_coef):
    inputs = [[1.0] * 21, [0.5] * 21]
    inputs[place][20] = value

    def of(leaves, reduction, on):
        function = reference.bradley_terry_loss if on is None else apt_kernels.bradley_terry_loss
        named = {} if on is None else {"backend": on}
        return function(*leaves, center_coef=center_coef, reduction=reduction, **named)

    _assert_limits(of, backend, inputs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_nan_stays_nan(backend, reduction):
    """A loss that is not a number must not be taken for one that is infinite."""
    chosen, rejected = torch.tensor([math.nan, -math.inf, 1.0]), torch.zeros(3)
    named = {"reduction": reduction, "backend": backend}
    assert apt_kernels.bradley_terry_loss(chosen, rejected, **named).isnan()
    for loss_type in ("sigmoid", "hinge", "discopop"):
        assert apt_kernels.dpo_loss(
            chosen, rejected, loss_type=loss_type, reference_free=True, **named
        )[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_infinite_loss_of_many_pairs(backend):
    """Several blocks of a sum, and a partial one."""
    for place in (0, 1500, 4098):
        rewards = torch.zeros(4099)
        rewards[place] = -math.inf
        for reduction in ("mean", "sum"):
            loss = apt_kernels.bradley_terry_loss(
                rewards, torch.zeros(4099), reduction=reduction, backend=backend
            )
            assert loss == math.inf
