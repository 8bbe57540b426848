"""The adapters against the peers' own functions, taken from the sources of their packages.

`make test-peers` downloads the packages and runs this; `make test` does not, as it needs neither
network nor packages whose own requirements are gigabytes. Only the functions named here are
compiled, so that nothing of a peer is imported.
"""

import ast
import importlib
import os
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import nn

from apt_kernels.integrations import liger as ours_liger
from apt_kernels.integrations import openrlhf, verl

PACKAGES = Path(os.environ["APT_PEERS"])
COUNTS = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9}


def source(pattern, names, **scope):
    """The named functions and classes of one file of a package."""
    (path,) = PACKAGES.glob(pattern)
    wanted = [x for x in ast.parse(path.read_text()).body if getattr(x, "name", None) in names]
    assert {x.name for x in wanted} == set(names)
    for statement in wanted:
        statement.decorator_list = []
    scope |= {"torch": torch, "nn": nn, "np": np, "Any": Any, "Optional": Optional}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def masked_mean(tensor, mask, dim=None):
    return (tensor * mask).sum(dim) / mask.sum(dim)


def assert_equal(got, wanted, leaf):
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double())
    grads = [torch.autograd.grad(x[0].sum(), leaf)[0] for x in (got, wanted)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def tokens(empty_row):
    """Log-probabilities with a graph, at sampling time, of the rollout; advantages; a mask."""
    logps = -torch.rand(5, 7, dtype=torch.float64)
    old = (logps + 0.3 * torch.randn(5, 7)).clamp(max=-0.01)
    rollout = (old + 0.4 * torch.randn(5, 7)).clamp(max=-0.01)
    mask = torch.arange(7) < torch.tensor([[7], [0 if empty_row else 3], [1], [5], [6]])
    return logps.requires_grad_(), old, rollout, torch.randn(5, 7).double(), mask


@pytest.fixture(scope="module")
def rlhf():
    names = ("aggregate_loss", "PolicyLoss", "ValueLoss")
    return source("openrlhf*/**/openrlhf/models/loss.py", names, masked_mean=masked_mean)


CORRECTIONS = [
    ("off", "mask", "ratio", (0.5, 5)),
    ("token", "mask", "ratio", (0.5, 2)),
    ("token", "clip", "ratio", (0.5, 2)),
    ("seq", "mask", "ratio", (0.8, 1.3)),
    ("token", "mask", "binary_kl", (0, 0.1)),
    ("token", "mask", "tv", (0, 0.2)),
    ("seq", "mask", "tv", (0, 0.2)),
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(c[:3]))
@pytest.mark.parametrize("mean_over_tokens", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["local", "global"])
def test_openrlhf_policy_loss(rlhf, correction, mean_over_tokens, kind, counts):
    logps, old, rollout, advantages, mask = tokens(empty_row=False)
    if kind == "gspo":
        advantages = advantages[:, :1].expand(5, 7)
    options = (0.2, 0.3, 1.7, mean_over_tokens, kind, *correction)
    results = [
        m.PolicyLoss(*options)(logps, old, advantages, mask, rollout, **counts)
        for m in (openrlhf, rlhf)
    ]
    assert_equal(*results, logps)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("mean_over_tokens", [True, False])
@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["local", "global"])
def test_openrlhf_value_loss(rlhf, clip, mean_over_tokens, counts):
    values, old, returns, _, mask = tokens(empty_row=False)
    results = [
        [m.ValueLoss(clip, mean_over_tokens)(values, old, returns, mask, **counts)]
        for m in (openrlhf, rlhf)
    ]
    assert_equal(*results, values)


@pytest.fixture(scope="module")
def core():
    names = ("masked_sum", "masked_mean", "clip_by_value")
    scope = {
        "verl_F": source("verl*/verl/utils/torch_functional.py", names),
        "defaultdict": defaultdict,
        "AlgoConfig": type("AlgoConfig", (), {}),
        "ActorConfig": object,
    }
    names = ("agg_loss", "compute_value_loss", "kl_penalty", "kl_penalty_forward")
    names += ("compute_grpo_outcome_advantage", "compute_rloo_outcome_advantage")
    names += ("compute_policy_loss_vanilla",)
    return source("verl*/verl/trainer/ppo/core_algos.py", names, **scope)


class Config(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("mode", verl.AGGREGATIONS)
@pytest.mark.parametrize("scale", [{}, {"loss_scale_factor": 11}], ids=["T", "factor"])
@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["local", "global"])
def test_verl_losses(core, mode, scale, counts):
    logps, old, _, advantages, mask = tokens(empty_row=True)
    mask, counts = mask.long(), counts | scale
    results = [[m.agg_loss(logps, mask, mode, **counts)] for m in (verl, core)]
    assert_equal(*results, logps)
    results = [
        m.compute_value_loss(logps, advantages, old, mask, 0.2, mode, **counts)
        for m in (verl, core)
    ]
    assert_equal(*results, logps)
    config = Config(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=2.0)
    config["global_batch_info"] = counts
    (loss, metrics), (their_loss, their_metrics) = (
        m.compute_policy_loss_vanilla(old, logps, advantages, mask, mode, config)
        for m in (verl, core)
    )
    assert_equal([loss], [their_loss], logps)
    assert metrics == pytest.approx(their_metrics, rel=1e-6)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("name", verl.ESTIMATORS)
def test_verl_kl_penalty(core, name, plus):
    logps = (3 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    reference = 3 * torch.randn(50, dtype=torch.float64)
    results = [[m.kl_penalty(logps, reference, name + plus)] for m in (verl, core)]
    assert_equal(*results, logps)


def test_verl_advantages_by_group(core):
    index = np.array(["a", "b", "a", "c", "b", "a", "d", "d"], dtype=object)
    rewards = torch.randn(8, 5)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5], [0], [2]])).long()
    for options in ((1e-6, True), (1e-3, True), (1e-6, False)):
        ours, theirs = (
            m.compute_grpo_outcome_advantage(rewards.clone(), mask, index, *options)[0]
            for m in (verl, core)
        )
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (
        m.compute_rloo_outcome_advantage(rewards.clone(), mask, index)[0] for m in (verl, core)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def liger():
    folder = str(PACKAGES / "liger-kernel")
    sys.path.insert(0, folder)
    yield importlib.import_module("liger_kernel.chunked_loss")
    sys.path.remove(folder)


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


DPO = [{"loss_type": name} for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard")]
DPO += [{"loss_type": name} for name in ("apo_zero", "apo_down", "discopop")]
DPO += [{"loss_type": "robust", "label_smoothing": 0.2}]
DPO += [{"loss_type": "exo_pair", "label_smoothing": 0.01}]
DPO += [
    {"average_log_prob": True, "compute_nll_loss": True, "alpha": 0.3},
    {"use_ref_model": False},
]


@pytest.mark.parametrize("options", DPO, ids=lambda o: "-".join(map(str, o.values())))
def test_liger_dpo(liger, options):
    hidden, weight, bias = states(6, 5, 4), states(11, 4), states(11)
    ref = (torch.randn(6, 5, 4).double(), torch.randn(11, 4).double(), torch.randn(11).double())
    target = torch.randint(0, 11, (6, 5))
    target[1, :2] = target[5, 3:] = -100
    results = []
    for module, compiled in ((ours_liger, {}), (liger, {"compiled": False})):
        criterion = module.LigerFusedLinearDPOLoss(beta=0.3, **options, **compiled)
        loss, more = criterion(weight, hidden, target, bias, *ref)
        results.append((loss, more, torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-4, atol=1e-5)


GRPO = [{"loss_type": n} for n in ("grpo", "bnpo", "dapo", "sapo")]
GRPO += [{"loss_type": "cispo", "epsilon_high": 1.1}]
GRPO += [{"loss_type": "dr_grpo", "max_completion_length": 9}, {"delta": 1.5}, {"beta": 0.0}]
GRPO += [{"use_bias_correction_kl": True}, {"temperature": 0.7}]
GRPO += [{"importance_sampling_level": "sequence", "loss_type": "grpo"}]


@pytest.mark.parametrize("options", GRPO, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("given", ["alone", "everything"])
def test_liger_grpo(liger, options, given):
    hidden, weight, bias = states(4, 6, 5), states(11, 5), states(11)
    ids = torch.randint(0, 11, (4, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4], [5]])).long()
    advantages = torch.randn(4).double()
    rest, options = {}, {"use_ref_model": given == "everything"} | options
    if given == "everything":
        now = (hidden @ weight.T + bias).detach() / options.get("temperature", 1.0)
        now = now.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        rest["old_per_token_logps"] = now + 0.2 * torch.randn(4, 6)
        rest["ref_per_token_logps"] = now + 0.2 * torch.randn(4, 6)
        rest["vllm_is_ratio"] = torch.rand(4, 1).double() + 0.5
        rest["num_items_in_batch"] = 40
    results = []
    for module, compiled in ((ours_liger, {}), (liger, {"compiled": False})):
        criterion = module.LigerFusedLinearGRPOLoss(**{"loss_type": "dapo"} | options, **compiled)
        loss, more = criterion(hidden, weight, ids, mask, advantages, bias, **rest)
        more = tuple(more)[: -1 if options.get("loss_type") == "cispo" else None]
        results.append((loss, more, torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-4, atol=1e-5)
