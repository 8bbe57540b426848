"""The Triton kernels as compiled for GPUs that are not here: registers, memory, instructions.

Every kernel is compiled with the blocks and specialisations that its launcher asks for.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton_offline as offline
from torch._subclasses.fake_tensor import FakeTensorMode

import apt_kernels.triton as kernels

TARGETS = tuple(offline.TARGETS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Half of the types suffice: bfloat16 and float16 differ in one instruction, except where gradients
# are products of coefficients.
COMPILED_DTYPES = ("float32", "bfloat16")
WIDE_LOAD = {"sm": r"LDG\.E(\.\w+)*\.128", "gf": r"(global|buffer)_load_dwordx4"}
WIDE_STORE = {"sm": r"STG\.E(\.\w+)*\.128", "gf": r"(global|buffer)_store_dwordx4"}
WIDE_COPY = {"sm": r"LDGSTS\.E.*\.128", "gf": r"(global|buffer)_load_dwordx[24]"}
TENSOR_CORE = {
    "sm_80": r"HMMA",
    "sm_90": r"HGMMA",
    "sm_100": r"UTC\w*MMA",
    "gfx942": r"v_mfma",
}

PRODUCTS = (
    "head_statistics_kernel",
    "grad_logits_tile_kernel",
    "grad_hidden_kernel",
    "grad_weight_kernel",
)


def _rows(dtype, V=50257, K=1, plain=False):
    A, B = 2, 3
    logits = torch.zeros(A, B, V, dtype=dtype)
    ids, mask = torch.zeros(A, B, K, dtype=torch.long), torch.ones(A, B, dtype=torch.bool)
    rows, lse = torch.ones(A, B), torch.zeros(A, B, 2)
    options = (None, None, 1.0, 0.0) if plain else (mask, rows, 1.0, 30.0)
    yield from offline.launches(kernels.token_logprobs_fwd, logits, ids, *options, not plain)
    yield from offline.launches(
        kernels.token_logprobs_bwd, ids.float(), None if plain else rows, logits, ids,
        *options[:2], lse, rows, *options[2:],
    )  # fmt: skip


def _small(dtype, B=5000):
    x, mask = torch.zeros(B, dtype=dtype), torch.ones(4, 99, dtype=torch.bool)
    logps = torch.zeros(4, 99, dtype=dtype)
    yield from offline.launches(kernels.sequence_logps_fwd, logps, mask, True)
    yield from offline.launches(kernels.sequence_logps_bwd, torch.ones(4), mask)
    for loss_type in range(13):
        references = (None, None) if loss_type > 10 else (x, x)
        yield from offline.launches(
            kernels.dpo_loss_fwd, x, x, *references, loss_type, 1, 0.1, 0.1, 0.5, 0.5
        )
    yield from offline.launches(kernels.bradley_terry_loss_fwd, x, x, torch.zeros(B), 0.0, 0.1, 1)


def _tokens(dtype, B=40, T=3000):
    x, mask, rows = torch.zeros(B, T, dtype=dtype), torch.ones(B, T).bool(), torch.zeros(B)
    bounds = (0.2, 0.2, 3.0, 1.0, 1.05, 0.1, 0.1, True)
    for loss_type, level, estimator in ((0, 0, 3), (1, 1, 1), (2, 0, 2), (3, 0, 3)):
        inputs = (x, x, x, mask, x, x, x, None, loss_type, level, estimator, 2)
        yield from offline.launches(kernels.policy_loss_fwd, *inputs, *bounds)
    yield from offline.launches(kernels.value_loss_fwd, x, x, mask, x, None, 0, 0.2)
    for kind in range(4):
        yield from offline.launches(kernels.group_advantages_fwd, rows, 8, kind, 1e-8)
    for estimator in (1, 2, 3):
        yield from offline.launches(kernels.kl_penalty_fwd, x, x, mask, estimator)
        yield from offline.launches(kernels.kl_penalty_bwd, x.float(), x, x, mask, estimator)
    flags = (mask, mask, mask)
    for time_major, bootstrap in ((False, rows), (False, x.float()), (True, x.float())):
        yield from offline.launches(
            kernels.gae_fwd, x, x, *flags, bootstrap, None, 0.99, 0.95, True, time_major
        )
    offsets = torch.zeros(B + 1, dtype=torch.long)
    packed, flags = x[0], tuple(flag[0] for flag in flags)
    yield from offline.launches(
        kernels.gae_fwd, packed, packed, *flags, rows, offsets, 0.99, 0.95, False, False
    )


def _heads(dtype, N=300, D=576, V=50257):
    hidden, weight = torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
    bias, ids = torch.zeros(V, dtype=dtype), torch.zeros(N, dtype=torch.long)
    mask, rows, lse = torch.ones(N, dtype=torch.bool), torch.ones(N), torch.zeros(N, 2)
    inputs = (hidden, weight, None, ids, mask, None)
    all_inputs = (hidden, weight, bias, ids, None, rows)
    plain, capped = (1.0, 0.0, 1.0), (1.0, 30.0, 0.5)
    for launcher, arguments in (
        (kernels.linear_token_logprobs_fwd, (*inputs, *plain, False, False)),
        (kernels.linear_token_logprobs_fwd, (*inputs, *plain, True, True)),
        (kernels.linear_token_logprobs_fwd, (*all_inputs, *capped, True, True)),
        (kernels.linear_token_logprobs_bwd,
         (rows, None, *inputs, lse, rows, *plain, True, True, False)),
        (kernels.linear_token_logprobs_bwd,
         (rows, rows, *all_inputs, lse, rows, *capped, True, True, True)),
        (kernels.linear_cross_entropy_fwd,
         (hidden, weight, None, ids, None, -100, 0.0, *plain[1:], 1, True, True, False)),
        (kernels.linear_cross_entropy_fwd,
         (hidden, weight, bias, ids, None, -100, 0.1, *capped[1:], 1, True, False, True)),
    ):  # fmt: skip
        if dtype == torch.float32 and not any(a is bias for a in arguments):
            continue  # float32 has the same tiles for all: the fullest kernels show the most
        yield from offline.launches(launcher, *arguments)


def _contrastive(dtype, N=4096, D=128):
    x, t = torch.zeros(N, D, dtype=dtype), torch.ones(())
    w, labels = torch.zeros(N), torch.zeros(N, dtype=torch.long)
    stats, sup_con_stats = torch.zeros(N, 4), torch.zeros(N, 3)
    views, softmax = (x[: N // 2], x[N // 2 :]), (None, None, 0.1, True)
    queue, sigmoid = (x, None, 0.1, True), (t, 1.0, t, 0.0, True, 0)
    alone = (None, None, t, 1.0, True, 0)
    for launcher, arguments in (
        (kernels.nt_xent_fwd, (*views, t, 1.0, True, True)),
        (kernels.nt_xent_bwd, (w, *views, t, 1.0, True, stats)),
        (kernels.info_nce_fwd, (x, x, *softmax, True, 0, None, False)),
        (kernels.info_nce_bwd,
         (w, w, x, x, *softmax, 0, None, stats, stats, True, True, False)),
        (kernels.info_nce_fwd, (x, x, *queue, False, 0, None, False)),
        (kernels.info_nce_bwd,
         (w, None, x, x, *queue, 0, None, stats, stats, True, True, True)),
        (kernels.siglip_loss_fwd, (x, x, *sigmoid, True)),
        (kernels.siglip_loss_bwd, (w, None, x, x, *sigmoid, True, True)),
        (kernels.sup_con_loss_fwd, (x, labels, *alone, True)),
        (kernels.sup_con_loss_bwd, (w, None, x, labels, *alone, sup_con_stats, None)),
    ):  # fmt: skip
        yield from offline.launches(launcher, *arguments)


def _distinct(launches):
    """One launch of each specialisation, by what would be compiled."""
    found = {}
    for launch in launches:
        source = offline.source(launch)
        found.setdefault((launch.name, repr(source.signature), repr(source.constants)), launch)
    return list(found.values())


def _compiled(launches, target):
    with offline.as_on(target):
        for launch in _distinct(launches()):
            machine = offline.compiled(launch, target)
            what = f"{launch.name} on {target}: {machine.registers} registers"
            assert machine.spills == 0, f"{what}, {machine.spills} bytes spilled"
            limit = offline.SHARED_LIMIT[target]
            assert machine.shared <= limit, f"{what}, {machine.shared} bytes of shared memory"
            yield launch, machine


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_streaming_kernels(target, dtype):
    """16 bytes a load and a store at a vocabulary of 50257 columns, of which the compiler knows
    nothing."""
    for plain in (True, False):
        for launch, machine in _compiled(lambda p=plain: _rows(DTYPES[dtype], plain=p), target):
            assert machine.count(WIDE_LOAD[target[:2]]), launch.name
            if "bwd" in launch.name:
                assert machine.count(WIDE_STORE[target[:2]]), launch.name


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels(target, dtype):
    for launch, machine in _compiled(lambda: _small(DTYPES[dtype]), target):
        if "sequence" in launch.name:
            wide = WIDE_LOAD if "fwd" in launch.name else WIDE_STORE
            assert machine.count(wide[target[:2]]), launch.name


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("target", ("sm_80", "gfx942"))  # elementwise: little depends on it
def test_token_kernels(target, dtype):
    """They compile, spill nothing and fit; the interpreter would let much pass."""
    names = {launch.name for launch, _ in _compiled(lambda: _tokens(DTYPES[dtype]), target)}
    assert {"_policy_loss_fwd_kernel", "_gae_fwd_kernel", "_whiten_kernel"} <= names


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_product_kernels(target, dtype):
    """Tensor cores, fed by 16-byte copies."""
    products = 0
    for launch, machine in _compiled(lambda: _heads(DTYPES[dtype]), target):
        kept_logits = launch.arguments.get("logits_ptr") is not None
        if launch.name not in PRODUCTS:
            continue
        if kept_logits and launch.name == "grad_logits_tile_kernel":  # takes no product
            assert not machine.count(TENSOR_CORE[target])
            continue
        products += 1
        assert machine.count(TENSOR_CORE[target]), launch.name
        assert machine.count(WIDE_COPY[target[:2]]), launch.name
    assert products >= 4


@pytest.mark.parametrize(
    "target, dtype, D",
    [*((t, d, 128) for t in TARGETS for d in DTYPES), ("sm_100", "float16", 64)],
)
def test_contrastive_kernels(target, dtype, D):
    products = 0
    for launch, machine in _compiled(lambda: _contrastive(DTYPES[dtype], D=D), target):
        if "PRECISION" in launch.arguments:
            products += 1
            assert machine.count(TENSOR_CORE[target]), launch.name
            assert machine.count(WIDE_COPY[target[:2]]), launch.name
    assert products >= 10


def test_no_compilation_for_new_lengths():
    """Launches of other lengths are specialised in the same way: the same code runs them."""

    def specialisations(launches):
        found = set()
        for launch in launches:
            source = offline.source(launch)
            signature = dict(source.signature)
            if launch.name == "grad_hidden_kernel":
                # One variant more: it rounds by itself where no other tile adds to its sums.
                signature["out_ptr"] = "either"
            found.add((launch.name, repr(signature), repr(source.constants), repr(source.attrs)))
        return found

    dtype = torch.bfloat16
    with FakeTensorMode():
        for first, *others in (
            [_rows(dtype, V=V, K=K) for V, K in ((50257, 3), (32000, 16), (151936, 1))],
            [_small(dtype, B=B) for B in (5000, 8192, 70001)],
            # losses of tokens and gae have one variant more, for rows of a multiple of 16
            [_tokens(dtype, B=B, T=T) for B, T in ((40, 3000), (500, 5001), (33, 70001))],
            [_heads(dtype, N=N, V=V) for N, V in ((300, 50257), (4096, 32000), (9001, 151936))],
            [_contrastive(dtype, N=N) for N in (4096, 10000, 70002)],
        ):
            wanted = specialisations(first)
            for other in others:
                assert specialisations(other) == wanted


def test_no_waiting_for_the_device():
    """With fake tensors, whatever asks the device for a number raises."""
    with FakeTensorMode():
        names = {launch.name for launch in _heads(torch.bfloat16)}
        names |= {launch.name for launch in _rows(torch.bfloat16)}
        names |= {launch.name for launch in _contrastive(torch.bfloat16)}
    assert "_similarity_bwd_kernel" in names
    assert {"live_rows_kernel", "grad_weight_kernel", "_token_logprobs_bwd_kernel"} <= names
