"""What a peer computes: from its fixture, or from the peer itself where it is installed."""

import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCES = ("fixture", "installed")


@functools.cache
def peer_results(peer: str, source: str) -> dict:
    """The inputs and cases of `make_peer_fixtures.py`, inputs as tensors.

    "installed" runs the peer in a process of its own; without the peer it skips, as the fixture
    covers the same facts.
    """
    if source == "fixture":
        results = json.loads((FIXTURES / f"{peer}.json").read_text())
    else:
        version = json.loads((FIXTURES / f"{peer}.json").read_text())["version"]
        package = {"open_clip": "open_clip_torch"}.get(peer, peer.replace("_", "-"))
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed; its fixture covers the same facts")
        if installed != version:
            pytest.skip(f"{package} {installed} is installed, the tests are of {version}")
        with tempfile.TemporaryDirectory() as folder:
            script = FIXTURES / "make_peer_fixtures.py"
            subprocess.run(
                [sys.executable, script, folder, peer],
                check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
            results = json.loads((pathlib.Path(folder) / f"{peer}.json").read_text())
    results["inputs"] = _tensors(results["inputs"])
    return results


def _tensors(tree):
    if isinstance(tree, dict):
        return {name: _tensors(x) for name, x in tree.items()}
    if not isinstance(tree, list):
        return tree
    floating = torch.tensor(tree).is_floating_point()
    return torch.tensor(tree, dtype=torch.float64 if floating else None)


def assert_same(case: dict, function, leaves: dict, metrics=None, rtol=1e-7):
    """Asserts that `function(**leaves)` has the case's loss, gradients and metrics.

    `function` returns a loss or (loss, metrics); `metrics` maps our names to the case's.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    result = function(**leaves)
    loss, ours = result if isinstance(result, tuple) else (result, {})
    assert loss.item() == pytest.approx(case["loss"], rel=rtol, abs=1e-9)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert any(g is not None and (g != 0).any() for g in grads)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        expected = torch.tensor(case["grads"][name], dtype=torch.float64)
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(
            grad, expected, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in (metrics or {}).items():
        # peers take means of float32 ones and zeros
        assert ours[mine].item() == pytest.approx(case["metrics"][theirs], rel=1e-6, abs=1e-8), mine
