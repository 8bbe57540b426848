"""Contrastive losses, value and gradient, against lightly, open_clip, pytorch-metric-learning."""

import pytest

from apt_kernels import reference
from support.peers import SOURCES, assert_same, peer_results

pytestmark = pytest.mark.parametrize("source", SOURCES)


def _pair(inputs):
    return {"a": inputs["a"], "b": inputs["b"]}


@pytest.mark.parametrize("peer", ["lightly", "pytorch_metric_learning"])
def test_nt_xent(peer, source):
    results = peer_results(peer, source)
    inputs = results["inputs"]
    assert_same(
        results["cases"]["nt_xent"],
        lambda a, b: reference.nt_xent(a, b, temperature=inputs["temperature"]),
        _pair(inputs),
    )


def test_info_nce_with_a_queue(source):
    results = peer_results("lightly", source)
    inputs = results["inputs"]

    def ours(a, b):
        return reference.info_nce(
            a, b.detach(), negatives=inputs["queue"], temperature=inputs["temperature"]
        )

    assert_same(results["cases"]["moco"], ours, _pair(inputs))


def test_info_nce_symmetric_with_a_learned_scale(source):
    results = peer_results("open_clip", source)
    inputs = results["inputs"]
    scale = inputs["a"].new_tensor(1 / inputs["temperature"])
    assert_same(
        results["cases"]["clip"],
        lambda a, b, scale: reference.info_nce(a, b, temperature=1 / scale, symmetric=True),
        _pair(inputs) | {"scale": scale},
    )


def test_siglip_loss_with_a_learned_scale_and_bias(source):
    results = peer_results("open_clip", source)
    inputs = results["inputs"]
    scale = inputs["a"].new_tensor(1 / inputs["temperature"])
    bias = inputs["a"].new_tensor(inputs["logit_bias"])

    def ours(a, b, scale, bias):
        return reference.siglip_loss(a, b, temperature=1 / scale, logit_bias=bias)

    leaves = _pair(inputs) | {"scale": scale, "bias": bias}
    assert_same(results["cases"]["siglip"], ours, leaves)


def test_sup_con_loss(source):
    results = peer_results("pytorch_metric_learning", source)
    inputs = results["inputs"]

    def ours(a):
        return reference.sup_con_loss(a, inputs["labels"], temperature=inputs["temperature"])

    assert_same(results["cases"]["sup_con"], ours, {"a": inputs["a"]})
