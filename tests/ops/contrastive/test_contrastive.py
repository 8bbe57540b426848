"""What the table of samples cannot say of the contrastive losses: peers, exactness, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import apt_kernels
from apt_kernels import info_nce, nt_xent, siglip_loss, sup_con_loss
from support.peers import SOURCES, assert_same, peer_results

NATIVE = "native" in apt_kernels.backends()["operations"]["nt_xent"]["cpu"]
needs_native = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
LOSSES = {
    "info_nce": info_nce,
    "symmetric": lambda x, y, **options: info_nce(x, y, symmetric=True, **options),
    "nt_xent": nt_xent,
    "siglip_loss": siglip_loss,
    "sup_con_loss": lambda x, y, **options: sup_con_loss(
        torch.cat([x, y]), torch.arange(len(x)).repeat(2), **options
    ),
}
each_loss = pytest.mark.parametrize(
    "loss", [pytest.param(f, id=name) for name, f in LOSSES.items()]
)


def views(count, width, noise=0.5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    y = x + noise * torch.randn(count, width, generator=generator)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def grads_of(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("peer", ["lightly", "pytorch_metric_learning"])
def test_nt_xent_is_the_peers(peer, source):
    results = peer_results(peer, source)
    inputs = results["inputs"]
    pair = {"a": inputs["a"], "b": inputs["b"]}
    options = {"temperature": inputs["temperature"]}
    assert_same(results["cases"]["nt_xent"], lambda a, b: nt_xent(a, b, **options), pair)


@pytest.mark.parametrize("source", SOURCES)
def test_info_nce_with_a_queue_is_lightlys(source):
    results = peer_results("lightly", source)
    inputs = results["inputs"]

    def ours(a, b):
        options = {"negatives": inputs["queue"], "temperature": inputs["temperature"]}
        return info_nce(a, b.detach(), **options)

    assert_same(results["cases"]["moco"], ours, {"a": inputs["a"], "b": inputs["b"]})


@pytest.mark.parametrize("source", SOURCES)
def test_symmetric_info_nce_and_siglip_are_open_clips(source):
    results = peer_results("open_clip", source)
    inputs = results["inputs"]
    leaves = {"a": inputs["a"], "b": inputs["b"]}
    leaves["scale"] = inputs["a"].new_tensor(1 / inputs["temperature"])

    def clip(a, b, scale):
        return info_nce(a, b, temperature=1 / scale, symmetric=True)

    def siglip(a, b, scale, bias):
        return siglip_loss(a, b, temperature=1 / scale, logit_bias=bias)

    assert_same(results["cases"]["clip"], clip, leaves)
    leaves["bias"] = inputs["a"].new_tensor(inputs["logit_bias"])
    assert_same(results["cases"]["siglip"], siglip, leaves)


@pytest.mark.parametrize("source", SOURCES)
def test_sup_con_loss_is_pytorch_metric_learnings(source):
    results = peer_results("pytorch_metric_learning", source)
    inputs = results["inputs"]

    def ours(a):
        return sup_con_loss(a, inputs["labels"], temperature=inputs["temperature"])

    assert_same(results["cases"]["sup_con"], ours, {"a": inputs["a"]})


@needs_native
def test_a_loss_near_zero_keeps_its_digits():
    """log(1 + e^-20) is 2e-9: a log-sum-exp minus the positive would leave noise of 1e-6."""
    u = F.normalize(torch.eye(6, 40) + 0.05 * torch.randn(6, 40), dim=-1)
    z1, z2 = u.clone().requires_grad_(), u.clone().requires_grad_()
    loss, correct = nt_xent(z1, z2, temperature=0.05, return_correct=True)
    d = u.double() / u.double().norm(dim=-1, keepdim=True)
    d = torch.cat([d, d])
    s = d @ d.T / 0.05
    own = torch.arange(12).roll(6)
    others = torch.eye(12, dtype=torch.bool).index_put((torch.arange(12), own), torch.tensor(True))
    gap = s.masked_fill(others, -torch.inf).logsumexp(-1) - s[torch.arange(12), own]
    exact = torch.log1p(gap.exp()).mean()
    assert 1e-10 < exact < 1e-7
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert correct == 12
    grad = grads_of(loss, z1)[0]
    assert 0 < grad.abs().max() < 1e-6


@needs_native
@pytest.mark.parametrize("name", ["info_nce", "symmetric", "nt_xent", "siglip_loss"])
def test_gradient_of_a_low_temperature_is_as_exact_as_plain_pytorch(name):
    """One such number may be luck on either side; the root mean square over seeds is not."""
    errors = {"native": [], "reference": []}
    for seed in range(24):
        x, y = views(41, 33, noise=3.0, seed=seed)
        exact = None
        for backend, dtype in (
            ("reference", torch.float64), ("native", torch.float32), ("reference", torch.float32),
        ):  # fmt: skip
            t = torch.tensor(0.01, dtype=dtype, requires_grad=True)
            a, b = (z.detach().to(dtype).requires_grad_() for z in (x, y))
            loss = LOSSES[name](a, b, temperature=t, backend=backend)
            results = torch.stack([loss, *grads_of(loss, t)]).double().detach()
            if exact is None:
                exact = results
            else:
                errors[backend].append((results - exact) / exact)
    native, plain = (torch.stack(e).square().mean(0).sqrt() for e in errors.values())
    assert (native <= 1.3 * plain + 1e-7).all(), (native, plain)


@each_loss
@pytest.mark.parametrize("count", [2, 7, 257, 513])
def test_equal_embeddings_have_no_gradient_and_are_not_right(loss, count):
    x = torch.full((count, 24), 0.3).requires_grad_()
    y = torch.full((count, 24), 0.3).requires_grad_()
    value, correct = loss(x, y, temperature=0.1, return_correct=True)
    assert correct == 0 and correct.dtype == torch.int64 and not correct.requires_grad
    assert value.isfinite()
    for grad in grads_of(value, x, y):
        assert grad.abs().max() < 1e-6


def test_the_similarity_of_a_row_with_itself_is_no_class():
    """Rows of length 40 at temperature 1: e^1600 would swamp every other class."""
    x, y = views(20, 16)
    with torch.no_grad():
        x *= 40 / x.norm(dim=-1, keepdim=True)
        y.copy_(-x)
    options = {"normalize": False, "temperature": 1.0}
    loss, correct = nt_xent(x, y, return_correct=True, **options)
    plain = apt_kernels.reference.nt_xent(x, y, **options)
    assert 1600 < loss < 3300 and correct == 0
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads_of(loss, x), grads_of(plain, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["info_nce", "symmetric", "nt_xent", "sup_con_loss"])
def test_one_sample_alone_is_right_and_costs_nothing(name):
    x, y = views(1, 9)
    loss, correct = LOSSES[name](x, y, return_correct=True)
    assert loss.abs() < 1e-6 and correct == (1 if name == "info_nce" else 2)
    for grad in grads_of(loss, x, y):
        assert grad.abs().max() < 1e-6


BACKENDS = apt_kernels.backends()["operations"]["nt_xent"]["cpu"]
WITH_QUEUE = {
    **LOSSES,
    "queue": lambda x, y, **options: info_nce(x, y, negatives=views(9, 16)[1], **options),
    "one_sample": lambda x, y, **options: info_nce(x[:1], y[:1], **options),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", ["first", "second", "both", "all"])
@pytest.mark.parametrize("name", WITH_QUEUE)
def test_rows_that_are_not_finite_are_seen(name, which, normalize, bad, backend):
    """Their loss is no number, so that a GradScaler leaves the step out, and no row is right whose
    classes hold one; that maxima drop NaN must not hide it."""
    x, y = (z.detach().half() for z in views(5, 16, noise=0.1))
    for z, chosen in ((x, ("first", "both")), (y, ("second", "both"))):
        if which == "all":
            z[:] = bad
        elif which in chosen:
            z[0, 3] = bad
    x, y = x.requires_grad_(), y.requires_grad_()
    options = {"normalize": normalize, "temperature": 0.5, "backend": backend}
    options["return_correct"] = True
    losses, correct = WITH_QUEUE[name](x, y, reduction="none", **options)
    assert name == "siglip_loss" or not losses.sum().isfinite()  # there inf may cost nothing
    if normalize or bad != torch.inf:  # infinite products: some backends give NaN, others infinity
        options["backend"] = "reference"
        exact, exact_correct = WITH_QUEUE[name](x.double(), y.double(), reduction="none", **options)
        assert torch.equal(losses.isnan(), exact.isnan())
        predictions = losses.numel() * (2 if name == "symmetric" else 1)
        assert losses.isnan().any() and correct == exact_correct and correct < predictions
        assert grads_of(losses.sum(), x)[0].isnan().any()


def test_sup_con_of_two_views_is_nt_xent():
    x, y = views(30, 12, noise=2.0, dtype=torch.float64)
    options = {"temperature": 0.1, "return_correct": True}
    loss, correct = nt_xent(x, y, **options)
    both, both_correct = LOSSES["sup_con_loss"](x, y, **options)
    torch.testing.assert_close(both, loss)
    torch.testing.assert_close(grads_of(both, x, y), grads_of(loss, x, y))
    assert both_correct == correct


def test_negatives_are_the_only_other_classes():
    x, y = views(5, 8, dtype=torch.float64)
    queue = torch.randn(8, 13, dtype=torch.float64)
    loss = info_nce(x, y, negatives=queue.t(), temperature=0.2)
    u, v, q = (F.normalize(t, dim=-1) for t in (x, y, queue.t()))
    logits = torch.cat([(u * v).sum(-1, keepdim=True), u @ q.t()], dim=-1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads_of(loss, x, y), grads_of(expected, x, y))


def test_a_learned_temperature_learns():
    x, y = views(64, 16, noise=0.2)
    module = apt_kernels.InfoNCELoss(torch.nn.Parameter(torch.tensor(1.0)), symmetric=True)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = module(x.detach(), y.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and module.temperature < 0.9


def test_modules_are_the_functions():
    x, y = views(9, 6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 5])
    options = {"temperature": 0.2, "normalize": False, "reduction": "sum", "return_correct": True}
    pairs = [
        (apt_kernels.InfoNCELoss(symmetric=True, **options)(x, y),
         info_nce(x, y, symmetric=True, **options)),
        (apt_kernels.InfoNCELoss(**options)(x[:5], y, label_offset=3),
         info_nce(x[:5], y, label_offset=3, **options)),
        (apt_kernels.InfoNCELoss(**options)(x, y, y[:4]),
         info_nce(x, y, negatives=y[:4], **options)),
        (apt_kernels.NTXentLoss(**options)(x, y), nt_xent(x, y, **options)),
        (apt_kernels.SigLIPLoss(logit_bias=-3.0, **options)(x[:4], y, label_offset=2),
         siglip_loss(x[:4], y, logit_bias=-3.0, label_offset=2, **options)),
        (apt_kernels.SupConLoss(**options)(x, labels), sup_con_loss(x, labels, **options)),
    ]  # fmt: skip
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: apt_kernels.InfoNCELoss(-1.0), "temperature"),
        (lambda: apt_kernels.InfoNCELoss(symmetric=1), "symmetric"),
        (lambda: apt_kernels.NTXentLoss(reduction="avg"), "reduction"),
        (lambda: apt_kernels.NTXentLoss(torch.ones(2)), "temperature"),
        (lambda: apt_kernels.SigLIPLoss(process_group="all"), "process_group"),
        (lambda: apt_kernels.SigLIPLoss(logit_bias="small"), "logit_bias"),
        (lambda: apt_kernels.SupConLoss(normalize=None), "normalize"),
        (lambda: apt_kernels.InfoNCELoss(return_correct=1), "return_correct"),
        (lambda: apt_kernels.LinearCrossEntropy(reduction="avg"), "reduction"),
        (lambda: apt_kernels.BradleyTerryLoss(reduction="avg"), "reduction"),
    ],
)
def test_modules_check_their_options_when_they_are_made(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}: expected"):
        make()


@needs_native
@each_loss
@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_a_wrong_temperature_in_a_tensor_is_an_error_on_the_cpu(loss, bad):
    x, y = views(4, 6)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        loss(x, y, temperature=torch.tensor(bad))


@each_loss
@pytest.mark.parametrize("upstream", [1e-32, 1e24])
def test_gradients_keep_their_digits_at_any_upstream_gradient(loss, upstream):
    """At a scale of 31 e^-lse is 1e-11: together with the upstream gradient beyond float32."""
    x, y = views(40, 16)
    found = {}
    for factor in (1.0, upstream):
        total = loss(x, y, temperature=1 / 31, reduction="sum")
        found[factor] = torch.autograd.grad(total, (x, y), torch.tensor(factor))
    for small, plain in zip(found[upstream], found[1.0], strict=True):
        scaled = small.double() / upstream
        torch.testing.assert_close(scaled, plain.double(), rtol=1e-4, atol=1e-5 * plain.abs().max())


@needs_native
@each_loss
def test_threads_change_nothing_but_rounding(loss):
    x, y = views(300, 20, noise=2.0)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        try:
            value, correct = loss(x, y, temperature=0.2, return_correct=True)
            results.append((value, correct, *grads_of(value, x, y)))
        finally:
            torch.set_num_threads(1)
    for first, second in zip(results[1], results[2], strict=True):
        assert torch.equal(first, second)
    for other in (results[1], results[3]):
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-7)


MEMORY = """
import sys, torch
sys.path.insert(0, "benchmarks")
from apt_kernels.commands import measure
from apt_kernels import info_nce, nt_xent
torch.set_num_threads(2)
x, y = torch.randn(4096, 128, requires_grad=True), torch.randn(4096, 128, requires_grad=True)
for loss in (lambda a, b: info_nce(a, b, symmetric=True), nt_xent):
    run = lambda: torch.autograd.grad(loss(x, y), (x, y))
    loss(x[:64], y[:64])
    print((measure.peak_memory(run) - x.nbytes - y.nbytes) / 2**20)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_tiles():
    """Eager needs 67 MB a matrix of info_nce and 268 MB one of nt_xent, several times."""
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    extra = [float(line) for line in run.stdout.split()]
    assert len(extra) == 2 and max(extra) <= 32, extra


def test_the_old_pair_is_an_error():
    """The losses used to give (loss, accuracy): who unpacks the loss is told."""
    for loss in LOSSES.values():
        with pytest.raises(TypeError, match="iteration over a 0-d tensor"):
            _, _ = loss(*views(4, 6))


def test_options_of_a_module_can_be_changed():
    x, y = views(6, 5)
    module = apt_kernels.NTXentLoss(0.5)
    module.temperature = 0.1
    torch.testing.assert_close(module(x, y), nt_xent(x, y, temperature=0.1), rtol=0, atol=0)
    module.temperature = torch.nn.Parameter(torch.tensor(0.2))
    module(x, y).backward()
    assert module.temperature.grad is not None and "temperature" in module.state_dict()
