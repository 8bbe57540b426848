"""Every kernel as compiled for sm_80, executed on the CPU, against float64. Run by .ci/run.

Not collected by itself: the executor is in the folder that APT_GPU_ON_CPU names. Bounds, alignment,
races and barriers are checked throughout. Of the registry's samples a few of every operation and
dtype are run, so chosen that every kernel of the machine-code table is among them.
"""

from __future__ import annotations

import functools
import shutil
from contextlib import contextmanager

import machine_code
import ptx_execution
import pytest
import torch
import triton_checks as checks

import apt_kernels.triton as kernels
from apt_kernels import dispatch
from apt_kernels.calls import TF32_ULPS, tensors
from apt_kernels.triton.common import rows
from gpu.cuda_emulation.checks import CHECKS
from gpu.test_cuda_seeded_bugs import BUGS

dispatch.add_backend("triton", kernels)
PTXError = ptx_execution.ptxrun.PTXError

MOST_ELEMENTS = 6000
SAMPLES = 3  # of an operation and dtype, about, besides the first two
TABLE_DTYPE = {torch.float16: "bfloat16", torch.int32: "int64"}  # those without rows of their own


def _operations():
    for op in machine_code.operations():
        for dtype in op.dtypes:
            if dtype != torch.float64:
                yield pytest.param(op, dtype, id=f"{op.name}-{str(dtype)[6:]}")


def _some(op, dtype) -> tuple[list, list]:
    """The first two, which are in the table, and others, each dtype other ones; the rest."""
    small = [s for s in op.samples(dtype) if sum(t.numel() for t in tensors(s)) <= MOST_ELEMENTS]
    step = max(1, len(small) // SAMPLES)
    chosen = [*small[:2], *small[2 + op.dtypes.index(dtype) * step // 3 :: step]]
    names = {sample.name for sample in chosen}
    return chosen, [sample for sample in small if sample.name not in names]


@pytest.mark.parametrize("op, dtype", _operations())
def test_registry_samples(op, dtype):
    named = TABLE_DTYPE.get(dtype, str(dtype).removeprefix("torch."))
    table = [r for r in machine_code.read() if (r["operation"], r["dtype"]) == (op.name, named)]
    wanted = {row["kernel"] for row in table}
    chosen, rest = _some(op, dtype)
    ulps = TF32_ULPS.get((op.name, dtype), checks.ULPS)
    with ptx_execution.Triton() as execution:

        def missing() -> set[str]:
            return wanted - {n.strip("_").removesuffix("_kernel") for n in execution.launches}

        for sample in chosen:
            checks.registry_sample(kernels, op.name, sample.name, dtype, ulps)
        for sample in rest:  # until every kernel has run
            if not missing():
                break
            checks.registry_sample(kernels, op.name, sample.name, dtype, ulps)
    assert wanted and not missing()


def test_products_of_float32_need_no_more_ulps(monkeypatch):
    monkeypatch.setattr(rows, "float32_products", lambda: "ieee")
    with ptx_execution.Triton():
        name = "normalizer_float_token_mean"
        checks.registry_sample(kernels, "linear_policy_loss", name, torch.float32, ulps=1)


@functools.cache
def _cuda(patches=()):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: its PTX is not executed")
    return ptx_execution.Cuda(patches)


@contextmanager
def _launchers(compiler):
    """(launchers, what counts their traffic)"""
    if compiler == "nvcc":
        with _cuda().noting():
            yield _cuda(), _cuda()
    else:
        with ptx_execution.Triton() as execution:
            yield kernels, execution


SLOW = ("wide_strides", "many_pairs")  # much memory, and many launches of the same


@pytest.mark.xdist_group("nvcc")
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SLOW])
def test_cuda_kernels(name):
    with _launchers("nvcc") as (launchers, _):
        CHECKS[name](launchers)


@pytest.mark.xdist_group("nvcc")
@pytest.mark.parametrize(
    "name, message",
    [
        ("shared_memory_of_two_sums_shared", "shared-memory race"),
        ("one_vector_past_the_row", "out-of-bounds"),
        ("vectors_not_aligned", "misaligned"),
    ],
)
def test_seeded_bugs_of_cuda_kernels_are_noticed(name, message):
    (bug,) = (bug for bug in BUGS if bug.name == name)
    launchers = _cuda(bug.patch)
    with launchers.noting(), pytest.raises(PTXError, match=message):
        for check in bug.checks:
            CHECKS[check](launchers)


@pytest.mark.parametrize("loss_type", checks.FINE_SMOOTHING)
def test_constants_of_the_smoothing_keep_their_digits(loss_type):
    with ptx_execution.Triton():  # the interpreter computes with scalars in float64
        checks.fine_smoothing(kernels, loss_type)


def _token_logprobs(name):
    def check(bugged):
        cases = checks.token_logprobs_cases(torch.float32)
        checks.token_logprobs(bugged, next(case for case in cases if case.name == name))

    return check


@pytest.mark.parametrize(
    "stem, text, replacement, check, message",
    [
        ("common/rows", "head, column < columns", "head, column <= columns",
         _token_logprobs("last_column_of_37"), "out-of-bounds"),
        ("common/rows", "(ALIGN - misaligned) % ALIGN", "misaligned * 0",
         _token_logprobs("sliced_columns"), "misaligned"),
        ("preference/dpo_loss", "if tl.program_id(0) == 0:", "if tl.program_id(0) >= 0:",
         lambda bugged: checks.dpo_loss(bugged, "sigmoid", torch.float32, "mean", 5000), "race"),
    ],
)  # fmt: skip
def test_seeded_bugs_of_triton_kernels_are_noticed(stem, text, replacement, check, message, seeded):
    bugged = seeded(stem, text, replacement)
    with ptx_execution.Triton(), pytest.raises(PTXError, match=message):
        check(bugged)


# What one pass may ask of memory, per byte of the floor: the logits read, backward also written.
BYTES = 1.02  # the edges of rows, and ids and numbers of a row that every warp loads
SECTORS = 1.10  # rows of odd length begin in the middle of one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [32000, 32003, 50257])
@pytest.mark.parametrize(
    "compiler", ["triton", pytest.param("nvcc", marks=pytest.mark.xdist_group("nvcc"))]
)
def test_traffic_of_token_logprobs(compiler, vocab, dtype):
    logits = torch.randn(1, 2, vocab).to(dtype)
    ids = torch.randint(0, vocab, (1, 2, 1))
    with _launchers(compiler) as (launchers, counter):
        counter.start_counting()
        logps, entropy, lse = launchers.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)
        _assert_streaming(counter.stop_counting(), logits.nbytes)
        saved = (logits, ids, None, None, lse, entropy, 1.0, 0.0)
        counter.start_counting()
        launchers.token_logprobs_bwd(logps, entropy, *saved)
        _assert_streaming(counter.stop_counting(), 2 * logits.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_of_kl_penalty(dtype):
    logps, ref_logps, grad = torch.randn(3, 16, 4096)
    inputs = (logps.to(dtype), ref_logps.to(dtype), None, 3)
    with ptx_execution.Triton() as counter:
        counter.start_counting()
        kernels.kl_penalty_fwd(*inputs)
        _assert_streaming(counter.stop_counting(), logps.numel() * (2 * dtype.itemsize + 4))
        counter.start_counting()
        kernels.kl_penalty_bwd(grad, *inputs)
        floor = logps.numel() * (2 * dtype.itemsize + 8)
        # beside vectors of 8 bfloat16 a thread stores its 8 floats in two halves of a sector each
        _assert_streaming(counter.stop_counting(), floor, sectors=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1024, 8192])
def test_traffic_of_pair_losses(B, dtype):
    pairs = [torch.randn(B).to(dtype) for _ in range(4)]
    with ptx_execution.Triton() as counter:
        counter.start_counting()
        kernels.dpo_loss_fwd(*pairs, 0, 0, 0.1, 0.0, 0.05, 0.5)
        _assert_streaming(counter.stop_counting(), B * (4 * dtype.itemsize + 20))
        counter.start_counting()
        kernels.bradley_terry_loss_fwd(*pairs[:3], 0.0, 0.1, 0)
        _assert_streaming(counter.stop_counting(), B * (3 * dtype.itemsize + 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [4096, 32003])
def test_traffic_of_sequence_logps(T, dtype):
    B = 4
    logps, mask = torch.randn(B, T).to(dtype), torch.rand(B, T) < 0.5
    with ptx_execution.Triton() as counter:
        for average in (False, True):
            counter.start_counting()
            kernels.sequence_logps_fwd(logps, mask, average)
            _assert_streaming(counter.stop_counting(), logps.numel() * (dtype.itemsize + 1))
        counter.start_counting()
        kernels.sequence_logps_bwd(torch.ones(B), mask)
        loads, stores = counter.stop_counting()
    floor = logps.numel() * (4 + 1)
    # every warp loads the gradient of its row: a sector
    assert floor <= loads.bytes + stores.bytes <= BYTES * floor
    assert (loads.sectors + stores.sectors) * ptx_execution.SECTOR <= SECTORS * floor


def _randn(*shape, dtype):
    return torch.randn(shape).to(dtype)


def _ema_update(launchers, dtype, source_dtype=None, begin=(0, 0)):
    targets, sources = (
        [_randn(n + 8, dtype=kind)[start : n + start] for n in (16384, 32775)]
        for kind, start in zip((dtype, source_dtype or dtype), begin, strict=True)
    )
    launchers.ema_update_fwd(targets, sources, 0.99)
    return sum(2 * t.nbytes + s.nbytes for t, s in zip(targets, sources, strict=True))


def _queue_push(launchers, dtype, pointer=512):
    queue, keys = _randn(128, 4096, dtype=dtype), _randn(256, 128, dtype=dtype)
    launchers.queue_push_fwd(queue, torch.tensor([pointer]), keys)
    return 2 * keys.nbytes


def _sequence_logps(launchers, dtype, T=4099):
    logps, mask = _randn(4, T, dtype=dtype), torch.rand(4, T) < 0.5
    launchers.sequence_logps_fwd(logps, mask, False)
    return logps.numel() * (dtype.itemsize + 1)


def _mlm_mask(launchers, dtype, T=2048):
    ids = torch.randint(0, 30522, (4, T), dtype=dtype)
    shares = (int(share * 2**32) for share in (0.15, 0.8, 0.9))
    launchers.mlm_mask_fwd(
        ids, None, None, None, None, (0, 1, 100, 3), 103, 30518, *shares, 1, 0, 0, True
    )
    return ids.numel() * (3 * dtype.itemsize + 1)


def _group_advantages(launchers, dtype, size=8):
    for kind in range(4):
        launchers.group_advantages_fwd(_randn(2048, dtype=dtype), size, kind, 1e-8)
    return 4 * 2048 * (dtype.itemsize + 4)


def _value_loss(launchers, dtype, B=32, T=1024):
    values, returns, old = (_randn(B, T, dtype=dtype) for _ in range(3))
    launchers.value_loss_fwd(values, returns, torch.rand(B, T) < 0.5, old, None, 0, 0.2)
    return B * T * (3 * dtype.itemsize + 1 + 4)


def _policy_loss(launchers, dtype, B=32, T=1024):
    logps, old, adv, ref = (_randn(B, T, dtype=dtype) for _ in range(4))
    options = (0, 0, 3, 0, 0.2, 0.2, 3.0, 1.0, 1.0, 0.1, 0.0, False)
    mask = torch.rand(B, T) < 0.5
    launchers.policy_loss_fwd(logps, old, adv, mask, None, ref, None, None, *options)
    return B * T * (4 * dtype.itemsize + 1 + 4)


def _gae(launchers, dtype, B=8, T=2048):
    rewards, values = _randn(B, T, dtype=dtype), _randn(B, T, dtype=dtype)
    options = (None, 0.99, 0.95, False, False)
    mask = torch.rand(B, T) < 0.9
    launchers.gae_fwd(rewards, values, mask, None, None, torch.randn(B), *options)
    return B * T * (2 * dtype.itemsize + 1 + 8)


def _moved(call, launchers, *arguments, **named) -> tuple[float, float]:
    """Bytes and sectors of a call, as shares of the floor that the call returns."""
    with ptx_execution.Triton() as counter:
        counter.start_counting()
        floor = call(launchers, *arguments, **named)
        traffic = counter.stop_counting()
    sectors = ptx_execution.SECTOR * sum(t.sectors for t in traffic)
    return sum(t.bytes for t in traffic) / floor, sectors / floor


F32, BF16, I64, I32 = torch.float32, torch.bfloat16, torch.int64, torch.int32


@pytest.mark.parametrize(
    "call, dtype",
    [
        *((call, d) for call in (_ema_update, _queue_push, _group_advantages, _gae, _value_loss,
                                 _policy_loss) for d in (F32, BF16)),
        *((_mlm_mask, d) for d in (I64, I32)),
    ],
)  # fmt: skip
def test_traffic_of_one_pass(call, dtype):
    bytes, sectors = _moved(call, kernels, dtype)
    assert 1.0 <= bytes <= BYTES
    assert 1.0 <= sectors <= BYTES


# What rows, groups and pointers that begin anywhere cost: sectors of which two requests take a
# part. docs/gpu.md has the table.
@pytest.mark.parametrize(
    "call, dtype, named, most",
    [
        (_ema_update, F32, {"begin": (3, 3)}, 1.02),
        (_ema_update, BF16, {"begin": (3, 3)}, 1.03),
        (_ema_update, F32, {"begin": (3, 2)}, 1.26),
        (_ema_update, BF16, {"begin": (3, 2)}, 1.51),
        (_ema_update, F32, {"source_dtype": BF16}, 1.02),
        (_ema_update, BF16, {"source_dtype": F32}, 1.02),
        (_ema_update, F32, {"source_dtype": BF16, "begin": (3, 3)}, 1.02),
        (_queue_push, F32, {"pointer": 3}, 1.03),
        (_queue_push, BF16, {"pointer": 3}, 1.05),
        (_mlm_mask, I64, {"T": 2051}, 1.01),
        (_mlm_mask, I32, {"T": 2051}, 1.01),
        (_mlm_mask, I64, {"T": 1023}, 1.13),
        (_mlm_mask, I32, {"T": 1023}, 1.24),
        (_group_advantages, F32, {"size": 4}, 1.0),
        (_group_advantages, BF16, {"size": 64}, 1.0),
        (_value_loss, F32, {"B": 4, "T": 4099}, 1.025),
        (_value_loss, BF16, {"B": 4, "T": 4099}, 1.035),
        (_policy_loss, F32, {"B": 4, "T": 4099}, 1.025),
        (_policy_loss, BF16, {"B": 4, "T": 4099}, 1.04),
        (_gae, F32, {"T": 2051}, 1.04),
        (_gae, BF16, {"T": 2051}, 1.04),
    ],
)
def test_sectors_of_other_sizes(call, dtype, named, most):
    _, sectors = _moved(call, kernels, dtype, **named)
    assert 1.0 <= sectors <= most


@pytest.mark.parametrize(
    "stem, text, replacement, call",
    [
        ("contrastive/ema_update_", "BLOCK = 4 * CHUNK", "BLOCK = CHUNK", _ema_update),
        ("contrastive/queue_push_", "WARPS = 2", "WARPS = 4", _queue_push),
        ("masking/mlm_mask",
         "eligible = live\n", "eligible = live & (tl.load(input_ids_ptr + at // 2) > -1)\n",
         _mlm_mask),
        ("policy/group_advantages", "WHOLE = 1024", "WHOLE = 32",
         functools.partial(_group_advantages, size=64)),
        ("policy/gae", "OF_A_WARP = 128", "OF_A_WARP = 256", _gae),
        ("logprobs/sequence_logps", "% ALIGN == 0:", "% ALIGN == 16:", _sequence_logps),
    ],
)  # fmt: skip
def test_more_traffic_is_noticed(stem, text, replacement, call, seeded):
    dtype = I64 if call is _mlm_mask else F32 if call is _gae else BF16
    most = SECTORS if call is _sequence_logps else BYTES
    assert max(_moved(call, seeded(stem, text, replacement), dtype)) > most


@pytest.mark.parametrize(
    "text, replacement",
    [
        ("tl.minimum(B * T // 16 - sixteens, (end + 15) // 16)", "(B * T // 16 - sixteens)"),
        ("BLOCK = 1024", "BLOCK = 128"),
    ],
)
def test_more_traffic_of_tokens_is_noticed(text, replacement, seeded):
    named = {"B": 4, "T": 4099}
    _, sectors = _moved(_policy_loss, kernels, F32, **named)
    _, more = _moved(_policy_loss, seeded("common/token_windows", text, replacement), F32, **named)
    assert more > sectors + 0.02


def _assert_streaming(traffic, floor: int, sectors: float = SECTORS) -> None:
    moved = sum(t.bytes for t in traffic)
    assert floor <= moved <= BYTES * floor
    assert sum(t.sectors for t in traffic) * ptx_execution.SECTOR <= sectors * floor
    for part in traffic:
        if part.bytes > 0.1 * floor:  # the stores of the forward pass are a few numbers a row
            assert part.bytes >= 256 * part.requests
