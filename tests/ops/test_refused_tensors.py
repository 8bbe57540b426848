"""Tensors of kinds that no kernel reads are refused by the name of their argument."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import apt_kernels
from apt_kernels.registry import OPS

KINDS = {
    "sparse": lambda t: t.to_sparse(),
    "compressed rows": lambda t: t.to_sparse_csr(),
    "complex": lambda t: t.to(torch.complex64),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
}
ONLY_DIMENSIONS = {"compressed rows": (2,), "jagged": (1, 2, 3, 4), "sparse": (0, 1, 2, 3, 4)}


def _arguments():
    """Every tensor argument of every operation, with a call that has it."""
    for op in OPS.values():
        seen = set()
        for sample in op.samples(op.dtypes[0]):
            call = inspect.signature(op.function).bind(*sample.args, **sample.kwargs)
            for name, value in call.arguments.items():
                many = isinstance(value, list) and bool(value)
                if isinstance(value[0] if many else value, torch.Tensor) and name not in seen:
                    seen.add(name)
                    yield pytest.param(op, call, name, id=f"{op.name}-{name}")


@pytest.mark.parametrize("op, call, name", list(_arguments()))
def test_a_tensor_without_plain_memory(op, call, name):
    value = call.arguments[name]
    first = (value[0] if isinstance(value, list) else value).detach()
    for kind, make in KINDS.items():
        if first.dim() not in ONLY_DIMENSIONS.get(kind, range(9)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these are prototypes
            bad = make(first)
        call.arguments[name] = [bad, *value[1:]] if isinstance(value, list) else bad
        try:
            with pytest.raises(TypeError, match=rf"^{name}(\[0\])?: expected .*, got ") as error:
                op.function(*call.args, **call.kwargs)
        finally:
            call.arguments[name] = value
        if kind in ("sparse", "compressed rows", "nested", "jagged"):
            assert "expected a dense tensor" in str(error.value), kind


def _beside_others():
    for parameter in _arguments():
        _, call, _ = parameter.values
        if sum(isinstance(v, torch.Tensor) for v in call.arguments.values()) > 1:
            yield parameter


@pytest.mark.parametrize("op, call, name", list(_beside_others()))
def test_a_tensor_without_memory_beside_others(op, call, name):
    """On the meta device; alone it is computed as meta tensors are, by the reference."""
    value = call.arguments[name]
    call.arguments[name] = value.detach().to("meta")
    try:
        with pytest.raises(ValueError, match=r"expected the device of .*meta"):
            op.function(*call.args, **call.kwargs)
    finally:
        call.arguments[name] = value


@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_numbers_that_float32_does_not_have(value):
    """They would be 0 or infinity in a kernel: a cap of 0 means none."""
    logits, ids, pair = torch.randn(2, 5), torch.zeros(2, dtype=torch.long), torch.zeros(3)
    for name in ("softcap", "temperature"):
        with pytest.raises(ValueError, match=f"{name}: expected a number in the range of float32"):
            apt_kernels.token_logprobs(logits, ids, **{name: value})
    for name in ("softcap", "logit_scale", "temperature"):
        with pytest.raises(ValueError, match=f"{name}: expected a number in the range of float32"):
            apt_kernels.linear_token_logprobs(logits, logits, ids, **{name: value})
    with pytest.raises(ValueError, match="beta: expected a number in the range of float32"):
        apt_kernels.dpo_loss(pair, pair, pair, pair, beta=value)


def test_a_small_cap_is_no_cap_of_none():
    logps = apt_kernels.token_logprobs(torch.randn(2, 5), torch.zeros(2).long(), softcap=1e-37)
    torch.testing.assert_close(logps, torch.full((2,), -torch.tensor(5.0).log()))


def test_ids_of_minus_100_get_a_hint():
    """-100 marks what `F.cross_entropy` ignores: people pass such labels as ids."""
    if "native" not in apt_kernels.backends()["operations"]["token_logprobs"]["cpu"]:
        pytest.skip("the reference does not look at ids")
    hidden, ids = torch.randn(1, 3, 4), torch.tensor([[1, -100, 2]])
    tokens = torch.zeros(1, 3)
    for call in (
        lambda: apt_kernels.token_logprobs(hidden, ids),
        lambda: apt_kernels.linear_token_logprobs(hidden, hidden[0], ids),
        lambda: apt_kernels.linear_policy_loss(hidden, hidden[0], ids, tokens, tokens, tokens == 0),
    ):
        with pytest.raises(ValueError, match=r"token_ids: .*got -100 in row 1; pass mask="):
            call()
    with pytest.raises(ValueError, match=r"got -7 in row 1$"):
        apt_kernels.token_logprobs(hidden, ids.masked_fill(ids == -100, -7))
