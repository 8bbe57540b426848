"""The public preference losses: against TRL, and what the registry cannot say."""

import pytest
import torch

import apt_kernels
from apt_kernels import reference
from apt_kernels.registry.preference.dpo_loss import NORMALISED, TYPES, WITHOUT_REFERENCE
from support.peers import SOURCES, assert_same, peer_results

BACKENDS = apt_kernels.backends()["operations"]["dpo_loss"]["cpu"]
TRL_DPO = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.1}, "nca_pair": {},
    "robust": {"label_smoothing": 0.2}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {},
    "aot": {"label_smoothing": 0.1}, "aot_unpaired": {"label_smoothing": 0.1}, "apo_down": {},
    "discopop": {"discopop_tau": 0.4}, "sigmoid_norm": {},
}  # fmt: skip
FREE = {
    "cpo sigmoid": {"beta": 0.7, "label_smoothing": 0.2, "reference_free": True},
    "cpo hinge": {"loss_type": "hinge", "beta": 0.7, "reference_free": True},
    "cpo ipo": {"loss_type": "ipo", "beta": 0.7, "reference_free": True},
    "cpo simpo": {"loss_type": "simpo", "beta": 0.7, "label_smoothing": 0.1, "simpo_gamma": 0.9},
    "orpo": {"loss_type": "orpo", "beta": 0.2},
}
# float64 runs on these two only
doubles = pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("native", "reference")])
sources = pytest.mark.parametrize("source", SOURCES)


def trl(source):
    results = peer_results("trl", source)
    return results["inputs"]["preference"], results["cases"]


def dpo_of_tokens(logps, inputs, backend, **options):
    mask = inputs["completion_mask"][:, 1:].bool()
    chosen, rejected = apt_kernels.sequence_logps(logps, mask, backend=backend).chunk(2)
    loss, *rewards = apt_kernels.dpo_loss(
        chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"],
        beta=0.3, backend=backend, **options,
    )  # fmt: skip
    return loss, {"chosen": rewards[0].mean(), "rejected": rewards[1].mean()}


METRICS = {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}


@doubles
@sources
@pytest.mark.parametrize("loss_type", TRL_DPO)
def test_as_trl(loss_type, source, backend):
    inputs, cases = trl(source)
    options = {**TRL_DPO[loss_type], "loss_type": loss_type}
    if loss_type in ("ipo", "sigmoid_norm"):  # TRL's are per token
        chosen, rejected = inputs["completion_mask"].sum(-1).chunk(2)
        options |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
    assert_same(
        cases[f"dpo {loss_type}"],
        lambda logps: dpo_of_tokens(logps, inputs, backend, **options),
        {"logps": inputs["logps"]},
        METRICS,
        rtol=1e-6 if loss_type == "exo_pair" else 1e-9,  # TRL's smoothing is rounded to float32
    )


@doubles
@sources
@pytest.mark.parametrize("case", FREE)
def test_reference_free_as_trl(case, source, backend):
    inputs, cases = trl(source)
    chosen, rejected = inputs["logps"].sum(-1).chunk(2)

    def ours(chosen, rejected):
        loss, *rewards = apt_kernels.dpo_loss(chosen, rejected, backend=backend, **FREE[case])
        return loss, {"chosen": rewards[0].mean(), "rejected": rewards[1].mean()}

    assert_same(
        cases[case],
        ours,
        {"chosen": chosen, "rejected": rejected},
        METRICS,
        rtol=1e-5 if case == "orpo" else 1e-9,  # TRL computes ORPO in float32
    )


@doubles
@sources
def test_kto_pair_as_trl(source, backend):
    inputs, cases = trl(source)
    assert_same(
        cases["kto"],
        lambda logps: dpo_of_tokens(logps, inputs, backend, loss_type="kto_pair")[0],
        {"logps": inputs["logps"]},
        rtol=1e-9,
    )


@doubles
@sources
@pytest.mark.parametrize(
    "case, options",
    [
        ("reward", {}),
        ("reward margin", {"margin": "margin"}),
        ("reward centred", {"center_coef": 0.05}),
    ],
)
def test_bradley_terry_as_trl(case, options, source, backend):
    inputs, cases = trl(source)
    options = {k: inputs[v] if isinstance(v, str) else v for k, v in options.items()}
    assert_same(
        cases[case],
        lambda chosen, rejected: apt_kernels.bradley_terry_loss(
            chosen, rejected, backend=backend, **options
        ),
        {"chosen": inputs["chosen_rewards"], "rejected": inputs["rejected_rewards"]},
        rtol=1e-9,
    )


def arguments(loss_type, shape=(6,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = 2 if loss_type in WITHOUT_REFERENCE else 4
    logps = -3 * torch.rand((count, *shape), generator=generator) - 0.01
    kwargs = {**TYPES[loss_type], "loss_type": loss_type}
    if loss_type in NORMALISED:
        lengths = torch.randint(1, 9, (2, *shape), generator=generator)
        kwargs |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    return [logps[0].requires_grad_(), logps[1].requires_grad_(), *logps[2:]], kwargs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", TYPES)
def test_a_column_is_a_batch(loss_type, backend):
    """(B, 1), and any other shape, is B pairs: also where pairs are sorted."""
    args, kwargs = arguments(loss_type, (6, 1))
    flat = {k: v.flatten() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    for reduction in ("mean", "sum", "none"):
        column = apt_kernels.dpo_loss(*args, **kwargs, reduction=reduction, backend=backend)
        row = apt_kernels.dpo_loss(
            *(a.flatten() for a in args), **flat, reduction=reduction, backend=backend
        )
        assert column[0].shape == ((6, 1) if reduction == "none" else ())
        assert column[1].shape == column[2].shape == (6, 1)
        for a, b in zip(column, row, strict=True):
            assert torch.equal(a.flatten(), b.flatten())
        assert not column[1].requires_grad and not column[2].requires_grad


@pytest.mark.parametrize("loss_type", TYPES)
def test_module_is_the_function(loss_type):
    args, kwargs = arguments(loss_type)
    lengths = {k: kwargs.pop(k) for k in list(kwargs) if k.endswith("lengths")}
    module = apt_kernels.DPOLoss(beta=0.4, reduction="sum", **kwargs)
    expected = apt_kernels.dpo_loss(*args, beta=0.4, reduction="sum", **kwargs, **lengths)
    for a, b in zip(module(*args, **lengths), expected, strict=True):
        assert torch.equal(a, b)
    assert f"loss_type='{loss_type}'" in repr(module) and "beta=0.4" in repr(module)


def test_module_rejects_unused_options_at_once():
    with pytest.raises(ValueError, match="simpo_gamma"):
        apt_kernels.DPOLoss(simpo_gamma=0.5)


def test_bradley_terry_module_is_the_function():
    chosen, rejected, margin = torch.randn(3, 7)
    module = apt_kernels.BradleyTerryLoss(margin=0.3, center_coef=0.1, reduction="none")
    for given, used in ((None, 0.3), (margin, margin)):
        expected = apt_kernels.bradley_terry_loss(
            chosen, rejected, margin=used, center_coef=0.1, reduction="none"
        )
        assert torch.equal(module(chosen, rejected, given), expected)


@pytest.mark.parametrize("count", [20_000, 65_536, 100_003])
def test_sum_does_not_depend_on_the_threads(count):
    args = [-50 * torch.rand(count) for _ in range(4)]
    threads = torch.get_num_threads()
    try:
        results = []
        for threads_now in (1, 2, 3):
            torch.set_num_threads(threads_now)
            loss, *rewards = apt_kernels.dpo_loss(*args)
            results.append((loss, *rewards, apt_kernels.bradley_terry_loss(*args[:2])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_equal_pairs_lose_exactly_log_two():
    """The first step of training: a sum of 100000 equal numbers that must not drift."""
    same = torch.full((100_000,), -37.3)
    loss, *_ = apt_kernels.dpo_loss(same, same, same, same)
    assert loss.item() == pytest.approx(0.6931471805599453, rel=6e-8)


def test_gradient_is_differentiable_once():
    """Also where a graph of the gradient is asked for: the error names the reference."""
    args, _ = arguments("sigmoid")
    plain = torch.autograd.grad(reference.dpo_loss(*args)[0], args[:1])
    scale = torch.ones((), requires_grad=True)
    loss = scale * apt_kernels.dpo_loss(*args)[0]
    (grad,) = torch.autograd.grad(loss, args[:1], create_graph=True)
    torch.testing.assert_close(grad.detach(), plain[0])
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(apt_kernels.dpo_loss(*args)[0], args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_backward_twice_over_a_retained_graph():
    args, _ = arguments("nca_pair")
    loss, *_ = apt_kernels.dpo_loss(*args, loss_type="nca_pair")
    loss.backward(retain_graph=True)
    first = args[0].grad.clone()
    args[0].grad.zero_()  # must not reach what the graph keeps
    loss.backward()
    assert torch.equal(args[0].grad, first) and first.abs().max() > 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_batch_of_upstream_gradients(reduction):
    chosen, rejected, *references = torch.randn(4, 5).unbind()
    for loss in (
        lambda x: apt_kernels.dpo_loss(x, rejected, *references, reduction=reduction)[0],
        lambda x: apt_kernels.bradley_terry_loss(x, rejected, reduction=reduction),
    ):
        one_by_one = torch.autograd.functional.jacobian(loss, chosen)
        at_once = torch.autograd.functional.jacobian(loss, chosen, vectorize=True)
        torch.testing.assert_close(at_once, one_by_one)


def test_types_that_compare_with_a_reference_need_one():
    logps = -torch.rand(2, 5, dtype=torch.float64) - 0.1
    for loss_type in ("sigmoid", "ipo", "nca_pair", "kto_pair", "aot"):
        with pytest.raises(ValueError, match=f"{loss_type} compares with a reference"):
            apt_kernels.dpo_loss(*logps, loss_type=loss_type)
        free = apt_kernels.dpo_loss(*logps, loss_type=loss_type, reference_free=True)[0]
        zeros = torch.zeros_like(logps)
        assert free == apt_kernels.dpo_loss(*logps, *zeros, loss_type=loss_type)[0]
    for loss_type in ("simpo", "orpo"):
        assert apt_kernels.dpo_loss(*logps, loss_type=loss_type)[0].isfinite()
    hidden, ids = torch.randn(4, 3, 8), torch.ones(4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="ref_chosen_logps: expected"):
        apt_kernels.linear_dpo_loss(hidden, torch.randn(6, 8), ids, ids)
