"""The adapters of losses: OpenRLHF, torchtune, torchrl, lightly, open_clip."""

import pkgutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import logsigmoid, normalize

from apt_kernels import integrations
from apt_kernels.integrations import lightly, open_clip, openrlhf, torchrl, torchtune
from support.peers import assert_same, peer_results


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal(got, wanted, *leaves):
    torch.testing.assert_close(got, wanted)
    weights = torch.arange(1, got.numel() + 1).view_as(got)
    grads = [
        torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (got, wanted)
    ]
    for a, b in zip(*grads, strict=True):
        assert (b != 0).any()
        torch.testing.assert_close(a, b)


def test_importing_an_adapter_imports_no_other_library():
    libraries = {name for _, name, _ in pkgutil.iter_modules(integrations.__path__)}
    modules = ", ".join(f"apt_kernels.integrations.{name}" for name in libraries)
    code = f"import sys, {modules}; print({libraries} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# -- OpenRLHF and torchtune ------------------------------------------------------------------------


def test_openrlhf_log_probs():
    logits, labels = randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    wanted = (logits / 0.7).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert_equal(openrlhf.log_probs_from_logits(logits, labels, 0.7), wanted, logits)


def mean(x, mask, tokens):
    if tokens:
        return (x * mask).sum() / mask.sum()
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_openrlhf_policy_loss(tokens, masked, dual_clip):
    logps, old, advantages = randn(4, 6), torch.randn(4, 6).double(), torch.randn(4, 6).double()
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [5]]) if masked else torch.ones(4, 6)
    ratio = (logps - old).exp()
    free, bounded = ratio * advantages, ratio.clamp(0.7, 1.4) * advantages
    surrogate = torch.minimum(free, bounded)
    if dual_clip is not None:
        floor = torch.maximum(surrogate, dual_clip * advantages)
        surrogate = torch.where(advantages < 0, floor, surrogate)
    criterion = openrlhf.PolicyLoss(0.3, 0.4, dual_clip, tokens)
    loss, clipped, kl, *correction = criterion(logps, old, advantages, mask if masked else None)
    assert_equal(loss, mean(-surrogate, mask, tokens), logps)
    torch.testing.assert_close(clipped, mean((bounded < free).double(), mask, True))
    torch.testing.assert_close(kl, mean(old - logps.detach(), mask, True))
    assert correction == [None, None]
    batch = {"dp_size": 2, "batch_num_tokens": 60, "global_batch_size": 10}
    given = mask if masked else None
    whole, *_ = criterion(logps, old, advantages, given, torch.zeros(4, 6), **batch)
    sums = (-surrogate * mask).sum() / 60 if tokens else loss * 4 / 10
    assert_equal(whole, 2 * sums, logps)


CORRECTIONS = {
    "keeps": (("token", "mask", "ratio", (0.4, 2.5)), [[2.0, 0.5, 0.0], [0.0, 1.0, 0.0]]),
    "bounds": (("token", "clip", "ratio", (0.4, 2.5)), [[2.0, 0.5, 2.5], [0.4, 1.0, 0.0]]),
    "rows": (("seq", "mask", "ratio", (0.9, 2.0)), [[2.0, 0.5, 4.0], [0.0, 0.0, 0.0]]),
    "coins": (("token", "mask", "tv", (0.0, 0.15)), [[2.0, 0.5, 0.0], [0.25, 1.0, 0.0]]),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_openrlhf_corrects_for_the_engine_that_sampled(name):
    options, weights = CORRECTIONS[name]
    ratio = torch.tensor([[2.0, 0.5, 4.0], [0.25, 1.0, torch.nan]]).double()
    rollout = torch.tensor([[0.1, 0.2, 0.2], [0.1, 0.5, 0.5]]).double()
    old = (rollout * ratio).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logps, advantages = randn(2, 3), torch.randn(2, 3).double()
    logps = (old.nan_to_num(0.0) + 0.01 * logps).detach().requires_grad_()
    criterion = openrlhf.PolicyLoss(0.2, 0.2, None, True, "ppo", *options)
    loss, _, _, drift, dropped = criterion(logps, old, advantages, mask, rollout.log())
    weights = torch.tensor(weights).double()
    surrogate = (logps - old.nan_to_num(0.0)).exp() * advantages  # nothing is clipped
    assert_equal(loss, -(weights * surrogate).sum() / 5, logps)
    torch.testing.assert_close(drift, -ratio.log()[mask.bool()].mean())
    shares = {"keeps": 2 / 5, "bounds": 2 / 5, "rows": 1 / 2, "coins": 1 / 5}
    assert dropped.item() == pytest.approx(shares[name])
    with pytest.raises(ValueError, match=r"^rollout_log_probs: expected a tensor"):
        criterion(logps, old, advantages, mask)


def test_openrlhf_gspo():
    logps, old, advantages = randn(4, 6), torch.randn(4, 6).double(), torch.randn(4, 1).double()
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [5]])
    ratio = (((logps - old) * mask).sum(-1, True) / mask.sum(-1, True)).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.7, 1.4) * advantages).expand(4, 6)
    criterion = openrlhf.PolicyLoss(0.3, 0.4, policy_loss_type="gspo")
    loss = criterion(logps, old, advantages.expand(4, 6), mask)[0]
    assert_equal(loss, mean(-surrogate, mask, False), logps)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_openrlhf_value_loss(tokens, clip):
    values, old, returns = randn(3, 5), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    loss = openrlhf.ValueLoss(clip, tokens)(values, old, returns, mask)
    assert_equal(loss, 0.5 * mean(error, mask, tokens), values)
    batch = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9}
    whole = openrlhf.ValueLoss(clip, tokens)(values, old, returns, mask, **batch)
    assert_equal(whole, loss * 2 * (10 / 40 if tokens else 3 / 9), values)


def test_openrlhf_pair_wise_loss():
    chosen, rejected, margin = randn(5), randn(5), torch.rand(5).double()
    criterion = openrlhf.PairWiseLoss()
    wanted = -logsigmoid(chosen - rejected).mean()
    assert_equal(criterion(chosen, rejected), wanted, chosen, rejected)
    wanted = -logsigmoid(chosen - rejected - margin).mean()
    assert_equal(criterion(chosen, rejected, margin), wanted, chosen, rejected)
    whole = torch.tensor([0, 1, 2, 0, 1])
    wanted = -logsigmoid(chosen - rejected - whole).mean()
    assert_equal(criterion(chosen, rejected, whole), wanted, chosen, rejected)


def test_dpo_losses():
    chosen, rejected = randn(5), randn(5)
    references = {
        "reference_chosen_logps": torch.randn(5).double(),
        "reference_rejected_logps": torch.randn(5).double(),
    }
    ref_chosen, ref_rejected = references.values()
    x = (chosen - rejected) - (ref_chosen - ref_rejected)
    losses = -0.9 * logsigmoid(0.3 * x) - 0.1 * logsigmoid(-0.3 * x)
    cases = [
        (openrlhf.DPOLoss(0.3, 0.1), losses.mean()),
        (openrlhf.DPOLoss(0.3, ipo=True), ((x - 1 / 0.6) ** 2).mean()),
        (torchtune.DPOLoss(0.3, 0.1), losses),
    ]
    for criterion, wanted in cases:
        loss, *rewards = criterion(chosen, rejected, **references)
        assert_equal(loss, wanted, chosen, rejected)
        torch.testing.assert_close(rewards[0], 0.3 * (chosen - ref_chosen).detach())
        torch.testing.assert_close(rewards[1], 0.3 * (rejected - ref_rejected).detach())
    policy = SimpleNamespace(chosen_logps=chosen, rejected_logps=rejected)
    reference = SimpleNamespace(chosen_logps=ref_chosen, rejected_logps=ref_rejected)
    assert_equal(torchtune.DPOLoss(0.3, 0.1)(policy, reference)[0], losses, chosen, rejected)
    with pytest.raises(ValueError, match=r"^reference_chosen_logps: expected None"):
        torchtune.DPOLoss()(policy, reference, ref_chosen)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: openrlhf.PolicyLoss(is_correction_level="seq", is_correction_mode="clip"),
            "is_correction_mode",
        ),
        (
            lambda: openrlhf.PolicyLoss(is_correction_level="token", is_correction_gating="tv"),
            "is_correction_threshold",
        ),
        (lambda: openrlhf.PolicyLoss(policy_loss_type="ppg"), "policy_loss_type"),
        (lambda: openrlhf.DPOLoss(0.1, 0.1, ipo=True), "label_smoothing"),
        (lambda: lightly.NTXentLoss(0.0), "temperature"),
        (lambda: lightly.NTXentLoss(memory_bank_size=(8, 4, 2)), "memory_bank_size"),
        (lambda: lightly.NTXentLoss(memory_bank_size=-8), "memory_bank_size"),
        (lambda: open_clip.ClipLoss(use_horovod=True), "use_horovod"),
        (lambda: open_clip.ClipLoss(world_size=2), "local_loss"),
        (lambda: open_clip.ClipLoss(local_loss=True, world_size=2), "gather_with_grad"),
        (lambda: open_clip.ClipLoss(True, True, world_size=2), "rank, world_size"),
        (lambda: open_clip.SigLipLoss(dist_impl="ring"), "dist_impl"),
    ],
)
def test_options_that_are_not_served(make, message):
    with pytest.raises(ValueError, match=f"^{message}: expected "):
        make()


def test_arguments_that_are_not_served():
    x, flags = torch.randn(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^logit_bias: expected None"):
        open_clip.ClipLoss()(x[0], x[0], 1.0, torch.tensor(1.0))
    estimate = torchrl.generalized_advantage_estimate
    with pytest.raises(ValueError, match=r"^reward: expected a tensor that does not require grad"):
        estimate(0.9, 0.9, x, x, x.clone().requires_grad_(), flags)
    with pytest.raises(ValueError, match=r"^done: expected shape"):
        estimate(0.9, 0.9, x, x, x, flags[:1])
    with pytest.raises(ValueError, match=r"^time_dim: expected an integer"):
        estimate(0.9, 0.9, x, x, x, flags, time_dim=3)


# -- torchrl ---------------------------------------------------------------------------------------


def test_torchrl_gae_on_its_fixture():
    results = peer_results("torchrl", "fixture")
    inputs, case = results["inputs"], results["cases"]["gae"]
    names = ("values", "next_values", "rewards", "done", "terminated")
    got = torchrl.generalized_advantage_estimate(
        0.96, 0.93, *(inputs[name].to(inputs[name]).unsqueeze(-1) for name in names)
    )
    for ours, name in zip(got, ("advantages", "returns"), strict=True):
        torch.testing.assert_close(ours.squeeze(-1), torch.tensor(case[name]).double())


@pytest.mark.parametrize("shape, time_dim", [((3, 7, 2), -2), ((2, 3, 7), -1), ((7, 3, 2, 1), 0)])
def test_torchrl_gae_step_by_step(shape, time_dim):
    """Values after a step that are none of the next step, terminated without done, any order."""
    value, following, reward = (torch.randn(shape).double() for _ in range(3))
    done, terminated = torch.rand(shape) < 0.3, torch.rand(shape) < 0.3
    for ended in (terminated, None):
        over = done if ended is None else ended
        wanted, trace = torch.empty(shape).double(), torch.zeros(())
        for t in reversed(range(7)):
            v, n, r, d, e = (x.select(time_dim, t) for x in (value, following, reward, done, over))
            trace = r + 0.9 * (n * ~e) - v + 0.9 * 0.8 * (trace * ~d)
            wanted.select(time_dim, t).copy_(trace)
        nan = torch.where(over, torch.nan, following)
        got = torchrl.generalized_advantage_estimate(
            0.9, 0.8, value, nan, reward, done, ended, time_dim=time_dim
        )
        torch.testing.assert_close(got[0], wanted)
        torch.testing.assert_close(got[1], wanted + value)


# -- lightly and open_clip -------------------------------------------------------------------------


def test_lightly_on_its_fixture():
    results = peer_results("lightly", "fixture")
    inputs, cases = results["inputs"], results["cases"]
    pair = {"a": inputs["a"], "b": inputs["b"]}
    plain = lightly.NTXentLoss(inputs["temperature"])
    assert_same(cases["nt_xent"], lambda a, b: plain(a, b), pair)
    criterion = lightly.NTXentLoss(inputs["temperature"], memory_bank_size=(9, 5))
    criterion.bank = normalize(inputs["queue"])
    assert_same(cases["moco"], lambda a, b: criterion(a, b.detach()), pair)


def test_lightly_bank_takes_the_keys_in_training_alone():
    criterion = lightly.NTXentLoss(0.2, memory_bank_size=[4, 5])
    torch.testing.assert_close(criterion.bank.norm(dim=-1), torch.ones(4))
    before = criterion.bank.clone()
    query, key = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    criterion(query.detach(), key)
    with torch.no_grad():
        criterion(query, key)
    assert torch.equal(criterion.bank, before)
    criterion(query, key).backward()  # after the push, with the bank as it was
    torch.testing.assert_close(criterion.bank[:3], normalize(key.detach()))
    assert torch.equal(criterion.bank[3], before[3]) and criterion.bank_ptr.item() == 3
    assert query.grad.abs().sum() > 0 and key.grad.abs().sum() > 0
    assert not criterion.state_dict()


def test_lightly_bank_as_wide_as_the_first_batch():
    criterion = lightly.NTXentLoss(0.2, memory_bank_size=4)
    query, key = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    loss = criterion(query, key)
    assert criterion.bank.shape == (4, 5) and loss.isfinite()
    torch.testing.assert_close(criterion.bank[:3], normalize(key))


def test_lightly_bank_takes_the_keys_of_all_processes(tmp_path):
    mp.spawn(fill_a_bank, (str(tmp_path / "store"),), nprocs=2)


def fill_a_bank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    criterion = lightly.NTXentLoss(0.2, (8, 5), gather_distributed=True)
    keys = torch.arange(1, 31).reshape(6, 5).float()
    before = criterion.bank.clone()
    query = torch.randn(3, 5, requires_grad=True)
    loss = criterion(query, keys[3 * rank : 3 * rank + 3])
    torch.testing.assert_close(criterion.bank[:6], normalize(keys))
    own = normalize(keys[3 * rank : 3 * rank + 3])
    logits = torch.cat([(normalize(query) * own).sum(1, True), normalize(query) @ before.T], 1)
    torch.testing.assert_close(loss, (-(logits / 0.2).log_softmax(1)[:, 0]).mean())
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_open_clip_on_its_fixture(shape):
    results = peer_results("open_clip", "fixture")
    inputs, cases = results["inputs"], results["cases"]
    leaves = {"a": inputs["a"], "b": inputs["b"]}
    leaves["scale"] = inputs["a"].new_full((), 1 / inputs["temperature"])
    clip, siglip = open_clip.ClipLoss(cache_labels=True), open_clip.SigLipLoss(dist_impl="gather")

    def clip_loss(a, b, scale):
        return clip(normalize(a), normalize(b), scale.reshape(shape), output_dict=True)[
            "contrastive_loss"
        ]

    def siglip_loss(a, b, scale, bias):
        return siglip(normalize(a), normalize(b), scale.reshape(shape), bias.reshape(shape))

    assert_same(cases["clip"], clip_loss, leaves)
    leaves["bias"] = inputs["a"].new_full((), inputs["logit_bias"])
    assert_same(cases["siglip"], siglip_loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [torch.float64, torch.float32])
def test_open_clip_with_a_scale_of_16_bits(dtype, features):
    a, b = normalize(randn(6, 8)).to(features), normalize(randn(6, 8)).to(features)
    scale = torch.tensor(2.6593).exp().to(dtype).requires_grad_()  # of open_clip, about 14.3
    bias = torch.tensor(-10.0, dtype=dtype)
    for criterion, more in ((open_clip.ClipLoss(), ()), (open_clip.SigLipLoss(), (bias,))):
        loss = criterion(a, b, scale, *more)
        exact = scale.detach().double().requires_grad_()
        wanted = criterion(a, b, exact, *more)
        number = criterion(a, b, float(scale.detach()), *map(float, more))
        assert abs(loss.item() - number.item()) < 1e-8
        gradient = torch.autograd.grad(wanted, exact)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, scale)[0], gradient.to(dtype))


def test_open_clip_without_a_bias_and_with_plain_numbers():
    a, b = normalize(randn(4, 5)), normalize(randn(4, 5))
    got = open_clip.SigLipLoss()(a, b, 3.0, output_dict=True)["contrastive_loss"]
    signs = 2 * torch.eye(4) - 1
    torch.testing.assert_close(got, -logsigmoid(signs * 3 * (a @ b.T)).sum() / 4)
