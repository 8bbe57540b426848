"""The Triton launchers under the interpreter, against float64. Run by test_triton_interpreter.py.

Not collected by itself: TRITON_INTERPRET=1 must be set before the kernels are imported. Names of
the cases say what they are there for; the registry's samples run over the same kernels in
test_ops.py.
"""

import importlib
import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py instead"

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter

triton_interpreter.install()

import triton_checks as checks
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

import apt_kernels.triton as kernels
from apt_kernels.calls import in_float64, tensors
from apt_kernels.triton.common import logistic
from apt_kernels.triton.head import launch as head
from ops.logprobs.test_linear_losses import test_a_loss_scale_saves_the_digits_of_float16  # noqa: F401
from ops.policy.test_gae import test_what_lies_behind_the_end_of_an_episode_may_be_anything  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def _cases(function):
    names = [case.name for case in function(torch.float32)]
    return pytest.mark.parametrize("name", names)


def _find(function, dtype, name):
    return next(case for case in function(dtype) if case.name == name)


@each_dtype
@_cases(checks.token_logprobs_cases)
def test_token_logprobs(name, dtype):
    checks.token_logprobs(kernels, _find(checks.token_logprobs_cases, dtype, name))


@each_dtype
@_cases(checks.sequence_logps_cases)
def test_sequence_logps(name, dtype):
    checks.sequence_logps(kernels, _find(checks.sequence_logps_cases, dtype, name))


@each_dtype
@pytest.mark.parametrize("loss_type", checks.DPO_TYPES)
def test_dpo_loss(loss_type, dtype):
    for reduction in ("none", "mean", "sum"):
        for B in (1, 7, 1025, 5000):
            checks.dpo_loss(kernels, loss_type, dtype, reduction, B)


@each_dtype
def test_dpo_loss_far_from_zero(dtype):
    for loss_type in checks.DPO_TYPES:
        if loss_type not in ("orpo", "discopop"):  # theirs overflow in float32, as the formula does
            checks.dpo_loss(kernels, loss_type, dtype, "none", 64, spread=300.0)


@each_dtype
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_bradley_terry_loss(reduction, dtype):
    for B in (1, 7, 1025, 5000):
        checks.bradley_terry_loss(kernels, dtype, reduction, B)
        checks.bradley_terry_loss(kernels, dtype, reduction, B, margins=True, center_coef=0.3)


@each_dtype
@_cases(checks.linear_token_logprobs_cases)
def test_linear_token_logprobs(name, dtype):
    case = _find(checks.linear_token_logprobs_cases, dtype, name)
    checks.linear_token_logprobs(kernels, case)


@each_dtype
@_cases(checks.linear_cross_entropy_cases)
def test_linear_cross_entropy(name, dtype):
    case = _find(checks.linear_cross_entropy_cases, dtype, name)
    checks.linear_cross_entropy(kernels, case)


# Of the registry's samples every so many, each dtype beginning with another one. The interpreter
# takes 20 ms a program: APT_TEST_BACKEND=triton runs test_ops.py on all of them, in 20 minutes.
EVERY = {
    "gae": 20, "group_advantages": 8, "kl_penalty": 4, "linear_dpo_loss": 30,
    "linear_policy_loss": 24, "policy_loss": 24, "value_loss": 8,
}  # fmt: skip
MOST_ELEMENTS = 3000


def _sampled():
    for operation, step in EVERY.items():
        for i, dtype in enumerate(DTYPES):
            for sample in list(checks.OPS[operation].samples(dtype))[i * step // 3 :: step]:
                if sum(t.numel() for t in tensors(sample)) < MOST_ELEMENTS:
                    yield pytest.param(
                        operation,
                        sample.name,
                        dtype,
                        id=f"{operation}-{str(dtype)[6:]}-{sample.name}",
                    )


@pytest.mark.parametrize("operation, name, dtype", list(_sampled()))
def test_registry(operation, name, dtype):
    checks.registry_sample(kernels, operation, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_many_tiles_and_parts(dtype, monkeypatch):
    """Several tiles of columns add to grad_hidden, several chunks of rows keep their logits."""
    monkeypatch.setattr(head, "TILE_ELEMENTS", 2**15)
    monkeypatch.setattr(head, "LEAST_COLUMNS", 128)
    monkeypatch.setattr(head, "LEAST_ROWS", 128)
    for parts in (1, 1024):  # one part of the columns for all tiles, and one for each
        monkeypatch.setattr(head, "PROGRAMS", parts)
        monkeypatch.setattr(head, "LEAST_PARTS", parts)
        for case in checks.linear_token_logprobs_cases(dtype):
            if case.name in ("everything", "odd_sizes"):
                checks.linear_token_logprobs(kernels, case)
        for case in checks.linear_cross_entropy_cases(dtype):
            if case.name in ("everything", "frozen_head", "bias_only"):
                checks.linear_cross_entropy(kernels, case)


@each_dtype
def test_large_groups(dtype):
    checks.large_groups(kernels, dtype)


@each_dtype
def test_losses_of_many_rows(dtype):
    checks.many_rows(kernels, dtype)


@each_dtype
def test_rows_of_a_multiple_of_16(dtype):
    """They take vectors, the same rows further apart do not; NaN where nothing counts."""
    B, T = 3, 1040
    mask = torch.rand(B, T) < 0.5
    x = [torch.randn(B, T).to(dtype).masked_fill(~mask, float("nan")) for _ in range(5)]
    advantages = torch.randn(B)
    options = (None, 0, 1, 3, 0, 0.2, 0.2, 3.0, 1.0, 1.0, 0.1, 0.1, True)
    outputs = []
    for further in (0, 1):
        apart = [torch.cat([t, t[:, :further]], 1)[:, :T] for t in (*x, mask)]
        logps, old, weights, ref, entropy, counts = apart
        losses = kernels.policy_loss_fwd(
            logps, old, advantages, counts, weights, ref, entropy, *options
        )
        values = kernels.value_loss_fwd(logps, old, counts, ref, None, 0, 0.2)
        logps = kernels.sequence_logps_fwd(logps, mask, True)[0]
        for grad in (*losses[2:4], values[2]):
            assert (grad[~mask] == 0).all() and grad[mask].isfinite().all()
        outputs.append((*losses, *values, logps))
    for near, apart in zip(*outputs, strict=True):
        torch.testing.assert_close(near, apart)


@each_dtype
def test_parts_of_buffers_are_updated_and_nothing_beside_them(dtype):
    whole = torch.randn(2, 6000).to(dtype)
    for begins in ((0, 0), (1, 1), (3, 11), (9, 9), (2, 3)):  # (2, 3): no vectors
        for sizes in ((1, 2, 4000, 3), (5, 2048, 12)):
            target, source = whole.clone()
            parts = ([], [])
            for side, buffer, at in zip(parts, (target, source), begins, strict=True):
                for size in sizes:
                    side.append(buffer[at : at + size])
                    at += size + 8  # elements between them that stay
            expected = [(t.double() + 0.25 * (s.double() - t.double())) for t, s in zip(*parts)]
            kernels.ema_update_fwd(*parts, 0.75)
            changed = torch.zeros(6000, dtype=torch.bool)
            for part, value in zip(parts[0], expected, strict=True):
                torch.testing.assert_close(part, value.to(dtype))
                at = part.storage_offset() - target.storage_offset()
                changed[at : at + len(part)] = True
            assert torch.equal(target[~changed], whole[0][~changed])
            assert torch.equal(source, whole[1])


def test_ids_out_of_range():
    """Their log-probability is NaN, they add no term to the gradient, and nothing is read there."""
    V = 50
    logits, ids = torch.randn(1, 5, V), torch.tensor([V, -1, 2**32 + 3, -(2**32) + 3, 7])
    grad = torch.ones(1, 5, 1)
    logps, entropy, lse = kernels.token_logprobs_fwd(
        logits, ids.view(1, 5, 1), None, None, 1.0, 0.0, False
    )
    assert logps[0, :4].isnan().all() and logps[0, 4].isfinite()
    grad_logits = kernels.token_logprobs_bwd(
        grad, None, logits, ids.view(1, 5, 1), None, None, lse, entropy, 1.0, 0.0
    )
    expected = torch.zeros(1, 5, V)
    expected[0, 4] = -logits[0, 4].softmax(-1)
    expected[0, 4, 7] += 1
    torch.testing.assert_close(grad_logits, expected)
    several = ids.expand(5, 5)[None]  # with one that is in range
    grad = torch.ones(1, 5, 5)
    saved = (logits, several.contiguous(), None, None, lse, entropy, 1.0, 0.0)
    grad_logits = kernels.token_logprobs_bwd(grad, None, *saved)
    expected = -logits.softmax(-1)
    expected[..., 7] += 1
    torch.testing.assert_close(grad_logits, expected)

    hidden, weight = torch.randn(5, 16), torch.randn(V, 16)
    inputs = (hidden, weight, None, ids, None, None)
    logps, _, lse, _ = kernels.linear_token_logprobs_fwd(*inputs, 1.0, 0.0, 1.0, False, False)
    assert logps[:4].isnan().all() and logps[4].isfinite()
    grad_hidden, _, _ = kernels.linear_token_logprobs_bwd(
        torch.ones(5), None, *inputs, lse, entropy, 1.0, 0.0, 1.0, True, False, False
    )
    grad_logits = torch.zeros(5, V)
    grad_logits[4] = -(hidden[4] @ weight.T).softmax(-1)
    grad_logits[4, 7] += 1
    expected = grad_logits @ weight
    torch.testing.assert_close(grad_hidden, expected, rtol=1e-4, atol=1e-5)
    loss, correct, *_ = kernels.linear_cross_entropy_fwd(
        *inputs[:4], None, -100, 0.0, 0.0, 1.0, 1, False, False, False
    )
    assert loss.isnan() and 0 <= correct <= 1


@pytest.mark.parametrize("loss_type", checks.FINE_SMOOTHING)
def test_constants_of_the_smoothing_keep_their_digits(loss_type):
    checks.fine_smoothing(kernels, loss_type)


def _head_gradients(function, sample, upstream):
    hidden, weight, *_ = sample.args
    logps = function(*sample.args, **sample.kwargs)
    leaves = [t for t in (hidden, weight, sample.kwargs.get("bias")) if t is not None]
    return torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))


@pytest.mark.parametrize("least", (1e-1, 1e-4))
@pytest.mark.parametrize("frozen", (False, True), ids=("all", "hidden_alone"))
def test_rows_of_small_upstream_gradients_keep_their_digits_in_float16(least, frozen):
    N, D, V = 40, 32, 90
    hidden, weight, bias, ids, mask = checks._head_inputs("x", N, D, V, torch.float16, True, 0.8)
    inputs = (hidden, weight, bias, ids, mask, None)
    upstream = torch.full((N,), least)
    upstream[mask.nonzero()[0]] = 1024.0
    upstream[mask.nonzero()[1]] = 0.0
    upstream[~mask] = torch.nan
    scales = (1.0, 0.0, 1.0)
    _, entropy, lse, _ = kernels.linear_token_logprobs_fwd(*inputs, *scales, False, False)
    need = (True, not frozen, not frozen)
    got = kernels.linear_token_logprobs_bwd(upstream, None, *inputs, lse, entropy, *scales, *need)
    sample = checks.Sample("", (hidden, weight, ids), {"mask": mask, "bias": bias})
    sample = in_float64(checks.fresh(sample))
    for t in (*sample.args[:2], sample.kwargs["bias"]):
        t.requires_grad_()
    exact = _head_gradients(
        checks.reference.linear_token_logprobs, sample, upstream.where(mask, 0.0)
    )
    for row in mask.nonzero()[2:]:
        error = (got[0][row].double() - exact[0][row]).norm()
        assert error <= (1e-3 if least > 1e-3 else 5e-2) * exact[0][row].norm()  # subnormals
    for one, other in list(zip(got, exact, strict=True))[1 : 1 if frozen else 3]:
        assert (one.double() - other).norm() <= 1e-3 * other.norm()


@each_dtype
def test_an_infinite_upstream_gradient_stays_in_its_row(dtype):
    hidden, weight, _, ids, _ = checks._head_inputs("y", 6, 32, 50, dtype, False, None)
    inputs = (hidden, weight, None, ids, None, None, 1.0, 0.0, 1.0)
    _, entropy, lse, _ = kernels.linear_token_logprobs_fwd(*inputs, False, False)

    def grad_hidden(first, others):
        upstream = torch.full((6,), others)
        upstream[0] = first
        backward = (*inputs[:6], lse, entropy, *inputs[6:], True, False, False)
        return kernels.linear_token_logprobs_bwd(upstream, None, *backward)[0]

    wanted = grad_hidden(1.0, 1.0)
    assert wanted.isfinite().all() and wanted.any(-1).all()
    for bad in (torch.inf, torch.nan, 1e30):
        got = grad_hidden(bad, 1.0)
        assert torch.equal(got[1:], wanted[1:])
        assert not got[0].isfinite().all() or dtype != torch.float16
    if dtype != torch.float16:
        small = grad_hidden(1e30, 2.0**-40).float() * 2.0**40
        torch.testing.assert_close(small[1:], wanted[1:].float())


def test_the_default_dtype_does_not_matter():
    hidden, weight, bias, ids, _ = checks._head_inputs("z", 8, 16, 50, torch.float32, True, None)
    options = (None, -100, 0.1, 0.0, 1.0, 1, True, True, True)
    wanted = kernels.linear_cross_entropy_fwd(hidden, weight, bias, ids, *options)
    none = (hidden[:0], weight, bias, ids[:0])
    torch.set_default_dtype(torch.float64)
    try:
        got = kernels.linear_cross_entropy_fwd(hidden, weight, bias, ids, *options)
        loss = kernels.linear_cross_entropy_fwd(*none, *options)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_zero_rows_launch_nothing(monkeypatch):
    def launched(*args, **kwargs):
        raise AssertionError("a kernel was launched for no rows")

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    for A, B in ((0, 3), (3, 0)):
        logits, ids = torch.empty(A, B, 5), torch.empty(A, B, 1, dtype=torch.long)
        logps, entropy, lse = kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)
        assert logps.shape == (A, B, 1) and entropy.shape == (A, B)
        grad = kernels.token_logprobs_bwd(
            logps, entropy, logits, ids, None, None, lse, entropy, 1.0, 0.0
        )
        assert grad.shape == (A, B, 5)
    none, ids = torch.empty(0), torch.empty(0, dtype=torch.long)
    nothing = torch.empty(0, 4)
    assert kernels.sequence_logps_fwd(nothing, nothing.bool(), True)[0].shape == (0,)
    for reduction, shape in ((0, (0,)), (1, ()), (2, ())):
        loss, *_ = kernels.dpo_loss_fwd(none, none, none, none, 0, reduction, 0.1, 0.0, 0.05, 0.5)
        assert loss.shape == shape and not loss.any()
        loss, _ = kernels.bradley_terry_loss_fwd(none, none, None, 0.0, 0.0, reduction)
        assert loss.shape == shape and not loss.any()
    hidden, weight = torch.empty(0, 8), torch.ones(5, 8)
    head_inputs = (hidden, weight, None, ids, None, None)
    logps, *_, formed = kernels.linear_token_logprobs_fwd(*head_inputs, 1.0, 0.0, 1.0, False, True)
    assert logps.shape == (0,) and formed.shape == (0, 8)
    grads = kernels.linear_token_logprobs_bwd(
        none, None, *head_inputs, torch.empty(0, 2), none, 1.0, 0.0, 1.0, True, True, False
    )
    assert grads[0].shape == (0, 8) and torch.equal(grads[1], torch.zeros(5, 8))
    loss, correct, _, grad_weight, _ = kernels.linear_cross_entropy_fwd(
        hidden, weight, None, ids, None, -100, 0.0, 0.0, 1.0, 1, True, True, False
    )
    assert loss == 0 and correct == 0 and torch.equal(grad_weight, torch.zeros(5, 8))


def test_launches(monkeypatch):
    """One launch forward and one backward where one pass is promised."""
    names = []
    run = InterpretedFunction.run

    def note(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    logits, ids = torch.randn(2, 3, 50), torch.zeros(2, 3, 1, dtype=torch.long)
    _, entropy, lse = kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)
    grad = torch.ones(2, 3, 1)
    kernels.token_logprobs_bwd(grad, entropy, logits, ids, None, None, lse, entropy, 1.0, 0.0)
    kernels.sequence_logps_fwd(torch.randn(4, 9), torch.ones(4, 9).bool(), True)
    kernels.sequence_logps_bwd(torch.ones(4), torch.ones(4, 9).bool())
    many = torch.randn(5000)
    kernels.dpo_loss_fwd(many, many, many, many, 0, 1, 0.1, 0.0, 0.05, 0.5)
    kernels.bradley_terry_loss_fwd(many, many, None, 0.0, 0.0, 1)
    assert names == [
        "_token_logprobs_fwd_kernel",
        "_token_logprobs_bwd_kernel",
        "_sequence_logps_fwd_kernel",
        "_sequence_logps_bwd_kernel",
        "_dpo_loss_fwd_kernel",
        "_bradley_terry_loss_fwd_kernel",
    ]


@pytest.mark.parametrize("masked", (False, True), ids=("all_rows", "a_quarter_of_the_rows"))
def test_products_done(masked, monkeypatch):
    """In units of rows that count x D x V: what the headers of the operations promise."""
    N, D, V = 512, 128, 256
    work = [0]
    dot = InterpreterBuilder.create_dot

    def count(self, a, b, *rest):
        work[0] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    unit = (N // 4 if masked else N) * D * V

    def units(launcher, *args):
        work[0] = 0
        results = launcher(*args)
        return work[0] / unit, results

    hidden, weight = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16()
    ids = torch.randint(0, V, (N,))
    mask = None
    labels = ids
    if masked:
        mask = torch.arange(N) % 4 == 1
        labels = ids.masked_fill(~mask, -100)
    inputs = (hidden, weight, None, ids, mask, None)
    forward = (*inputs, 1.0, 0.0, 1.0, False)
    done, (_, entropy, lse, _) = units(kernels.linear_token_logprobs_fwd, *forward, False)
    assert done == 1
    assert units(kernels.linear_token_logprobs_fwd, *forward, True)[0] == 2
    backward = (torch.randn(N), None, *inputs, lse, entropy, 1.0, 0.0, 1.0)
    for needs, wanted in (((True, True), 3), ((True, False), 2), ((False, True), 2)):
        assert units(kernels.linear_token_logprobs_bwd, *backward, *needs, False)[0] == wanted
    for needs, wanted in (((False, False), 1), ((True, False), 2), ((True, True), 4)):
        done, _ = units(
            kernels.linear_cross_entropy_fwd, hidden, weight, None, labels, None, -100, 0.0, 0.0,
            1.0, 1, *needs, False,
        )  # fmt: skip
        assert done == wanted


def test_offsets_beyond_32_bits():
    far = checks.sparse((2, 2**31 + 24), torch.bfloat16)
    V = 45
    near = torch.randn(2, 1, V).bfloat16()
    logits = far[:, -V - 3 : -3].unsqueeze(1)  # the second row begins beyond 2^32 elements
    logits.copy_(near)
    ids = torch.tensor([3, 44]).view(2, 1, 1)
    outputs = [
        kernels.token_logprobs_fwd(x, ids, None, None, 1.0, 0.0, True) for x in (logits, near)
    ]
    for far_output, near_output in zip(*outputs, strict=True):
        assert torch.equal(far_output, near_output) and not near_output.isnan().any()
    grad = torch.randn(2, 1, 1)
    grads = [
        kernels.token_logprobs_bwd(grad, None, x, ids, None, None, outputs[1][2], None, 1.0, 0.0)
        for x in (logits, near)
    ]
    assert torch.equal(*grads) and grads[0].any()

    N, D, V = 2**16 + 5, 2**15, 7  # the last rows of hidden begin beyond 2^31 elements
    hidden, mask = checks.sparse((N, D), torch.bfloat16), torch.zeros(N, dtype=torch.bool)
    mask[-3:] = True
    hidden[-3:] = torch.randn(3, D).bfloat16()
    weight, ids = torch.randn(V, D).bfloat16(), torch.randint(0, V, (N,))
    shared = (1.0, 0.0, 0.006)
    last = (hidden[-3:], weight, None, ids[-3:], None, None)
    logps, entropy, lse, _ = kernels.linear_token_logprobs_fwd(
        hidden, weight, None, ids, mask, None, *shared, True, False
    )
    wanted, *_ = kernels.linear_token_logprobs_fwd(*last, *shared, False, False)
    torch.testing.assert_close(logps[-3:], wanted)
    assert not logps[:-3].any()
    grad = torch.zeros(N)
    grad[-3:] = 1.0
    _, grad_weight, _ = kernels.linear_token_logprobs_bwd(
        grad, None, hidden, weight, None, ids, mask, None, lse, entropy, *shared, False, True, False
    )
    _, wanted, _ = kernels.linear_token_logprobs_bwd(
        grad[-3:], None, *last, lse[-3:], entropy, *shared, False, True, False
    )
    assert wanted.any()
    torch.testing.assert_close(grad_weight, wanted)


def _check(check, cases, name, dtype=torch.float32):
    return lambda bugged: check(bugged, _find(cases, dtype, name))


def _check_in_few_parts(bugged):
    launch = importlib.import_module(f"{bugged.__name__}.head.launch")
    launch.LEAST_PARTS = launch.PROGRAMS = 1
    _check(*_head, "no_entropy")(bugged)


_token = (checks.token_logprobs, checks.token_logprobs_cases)
_head = (checks.linear_token_logprobs, checks.linear_token_logprobs_cases)
_cross = (checks.linear_cross_entropy, checks.linear_cross_entropy_cases)
_sequence = (checks.sequence_logps, checks.sequence_logps_cases)
_last = "offset < body, other=-float"
_dpo_block = "range(BLOCK, whole, BLOCK)"
_first = "if tl.program_id(0) == 0:"
_dot = "total = tl.dot(tl.trans(grad), h, total, input_precision=PRECISION)"
_narrow = "\n        total = total.to(tl.bfloat16).to(tl.float32)"
_shift = 'tl.where(new_m == -float("inf"), 0.0, new_m)'
_strides = "(row // B) * stride_a + (row % B) * stride_b"
_swapped = "(row // B) * stride_b + (row % B) * stride_a"
_below = "tl.minimum(tl.load(count_ptr), row_end)"


def _of(operation, name):
    return lambda bugged: checks.registry_sample(bugged, operation, name)


# (what was done, in which file, the text, what it becomes, the check that must notice)
SEEDED = [
    ("shifts a mask", "logprobs/token_logprobs", _last, "offset <= body, other=-float",
     _check(*_token, "last_column_of_4097")),
    ("swaps the strides", "logprobs/token_logprobs",
     _strides, _swapped, _check(*_token, "transposed")),
    ("reads past the row", "common/rows", "head, column < columns", "head, column <= columns",
     _check(*_token, "last_column_of_37")),
    ("lets body and tail overlap", "common/rows", "(columns - head) // ALIGN", "columns // ALIGN",
     _check(*_token, "last_column_of_37")),
    ("loses the guard of -inf", "common/rows",
     _shift, "new_m", _check(*_token, "excluded_columns")),
    ("loses the guard of p = 0", "logprobs/token_logprobs", "tl.where(p == 0, 0.0, -p * weight)",
     "-p * weight", _check(*_token, "excluded_columns")),
    ("leaves masked rows unwritten", "logprobs/token_logprobs",
     "_store_zeros(grad_ptr, V, ALIGN, BLOCK)",
     "pass", _check(*_token, "all_masked")),
    ("forgets an id", "logprobs/token_logprobs", "for k in range(1, K):", "for k in range(2, K):",
     _check(*_token, "repeated_ids")),
    ("rounds the temperature's reciprocal", "common/rows", "tl.fma(x, inverse, x * inverse_rest)",
     "x * inverse.to(tl.bfloat16).to(tl.float32)", _check(*_token, "temperature")),
    ("divides by no tokens", "logprobs/sequence_logps", "tl.maximum(tokens, 1)", "tokens",
     _check(*_sequence, "all_masked")),
    ("shifts the mask of tokens", "logprobs/sequence_logps", "tl.multiple_of(mask_ptr + head",
     "tl.multiple_of(mask_ptr + 0", _check(*_sequence, "length_1025")),
    ("forgets pairs", "preference/dpo_loss", _dpo_block, "range(BLOCK, whole - BLOCK, BLOCK)",
     lambda bugged: checks.dpo_loss(bugged, "sigmoid", torch.float32, "mean", 5000)),
    ("lets all programs store the sum", "preference/dpo_loss", _first, "if tl.program_id(0) >= 0:",
     lambda bugged: checks.dpo_loss(bugged, "sigmoid", torch.float32, "mean", 5000)),
    ("loses the sign", "preference/bradley_terry_loss", "pull - wrong, pull + wrong",
     "pull + wrong, pull + wrong",
     lambda bugged: checks.bradley_terry_loss(bugged, torch.float32, "sum", 7)),
    ("accumulates in bfloat16", "head/products", _dot, _dot + _narrow,
     _check(*_head, "no_entropy")),
    ("forgets a row", "head/logits", _below, _below + " - 1", _check(*_head, "everything")),
    ("forgets the bias", "head/logits", "if bias_ptr is not None:", "if False:",
     _check(*_cross, "everything")),
    ("never rescales", "head/logits", "s = s * old + tl.sum(e, 1)", "s = s + tl.sum(e, 1)",
     _check_in_few_parts),
    ("takes the last of equals", "logprobs/linear_cross_entropy",
     "part_top > top", "part_top >= top",
     _check(*_cross, "equal_logits")),
    ("clips on the wrong side", "policy/policy_loss", "tl.where(negative, low, ",
     "tl.where(negative, high, ", _of("policy_loss", "plain")),
    ("loses the dual clip", "policy/policy_loss", "tl.where(negative, dual_clip, high)", "high",
     _of("policy_loss", "dual_clip_token_mean")),
    ("forgets the weights' gradient", "policy/policy_loss", "        grad *= weight\n", "",
     _of("policy_loss", "clip_weights")),
    ("writes masked gradients", "policy/policy_loss", "tl.where(counts, grad, 0.0)",
     "grad", _of("policy_loss", "k1_0.3")),
    ("cancels near 0", "common/token_windows", "near = tl.abs(x) < 1.0", "near = tl.abs(x) < 0.0",
     _of("kl_penalty", "k3_near")),
    ("keeps the clipped gradient", "policy/value_loss", "tl.where(worse, 0.0, error)", "error",
     _of("value_loss", "token_mean_0.2")),
    ("measures returns from 0", "policy/value_loss",
     "from_pivot = tl.where(counts, x - pivot, 0.0)",
     "pivot *= 0.0; from_pivot = tl.where(counts, x, 0.0)", _of("value_loss", "equal_returns_700")),
    ("forgets the spread between tiles", "policy/value_loss", "around, tl.sum(within, 0))",
     "0.0 * around, tl.sum(within, 0))", _of("value_loss", "token_mean_0.2")),
    ("takes filled rows for tokens", "common/token_windows",
     "tl.where(j == NUMBER, totals, 0.0), 0), 1.0)",
     "full, 0), 1.0)", lambda bugged: checks.many_rows(bugged, torch.float32)),
    ("sums where a row has a mean", "common/token_windows",
     "tl.where(is_loss[None, :], mean, part)",
     "part", _of("value_loss", "sequence_mean_0.2")),
    ("gives all rows one factor", "common/token_windows",
     "factor /= tl.maximum(", "factor += 0.0 * tl.maximum(",
     _of("value_loss", "sequence_mean_0.2")),
    ("divides by the size", "policy/group_advantages", "tl.maximum(G - 1, 1)", "tl.maximum(G, 1)",
     _of("group_advantages", "normalized")),
    ("counts ties in full", "policy/group_advantages", "0.5 * equal", "1.0 * equal",
     _of("group_advantages", "rank_equal")),
    ("scans forward", "policy/gae",
     "(delta, kept), 1, _then, reverse=True", "(delta, kept), 1, _then",
     _of("gae", "plain")),
    ("forgets the tile before", "policy/gae", "advantage = _advantage(delta, kept, trace)",
     "advantage = delta",
     _of("gae", "long")),
    ("takes the masked value", "policy/gae", "counts.to(tl.int32)), 1, _first_two",
     "live.to(tl.int32)), 1, _first_two", _of("gae", "dirty_random_False")),
    ("forgets to end", "policy/gae", "tl.where(ends | breaks | last, 0.0, decay)",
     "tl.where(breaks | last, 0.0, decay)", _of("gae", "terminated_rows_37")),
    ("takes the biased variance", "policy/gae", "tl.maximum(count - 1, 1)", "tl.maximum(count, 1)",
     _of("gae", "1_rows_of_5")),
    ("forgets the upstream scale", "policy/linear_policy_loss", "factors * upstream", "factors",
     lambda bugged: checks.registry_sample(bugged, "linear_policy_loss", "plain", torch.float16)),
]  # fmt: skip


@pytest.mark.parametrize("bug", SEEDED, ids=lambda bug: bug[0].replace(" ", "_"))
def test_seeded_bugs_are_noticed(bug, seeded):
    _, stem, text, replacement, check = bug
    bugged = seeded(stem, text, replacement)
    with pytest.raises((AssertionError, InterpreterError)):
        check(bugged)


def test_a_copy_without_a_bug_passes(seeded):
    same = seeded("rows", "ALIGN", "ALIGN")
    for *_, check in SEEDED:
        check(same)


@triton.jit
def _arithmetic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    tl.store(out_ptr + lane, (x.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(out_ptr + BLOCK + lane, x * x + x)
    square = tl.reshape(x, [16, 16])
    product = tl.dot(square, tl.trans(square)).to(tl.bfloat16)
    tl.store(out_ptr + 2 * BLOCK + lane, tl.reshape(product, [BLOCK]))


@triton.jit
def _stray_kernel(x_ptr, out_ptr, SHIFT: tl.constexpr, STEP: tl.constexpr):
    place = tl.program_id(0) * STEP + tl.arange(0, 4)
    tl.store(out_ptr + place, tl.load(x_ptr + place + SHIFT))


def test_the_interpreter_itself():
    x = torch.randn(256).bfloat16()
    out = torch.empty(3, 256, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, out, BLOCK=256)
    square = x.view(16, 16).float()
    wanted = [(x.float() * 1.001).bfloat16(), x * x + x, (square @ square.T).bfloat16().flatten()]
    torch.testing.assert_close(out, torch.stack(wanted), rtol=0, atol=0)

    x, out = torch.zeros(8), torch.empty(8)
    _stray_kernel[(2,)](x, out, SHIFT=0, STEP=4)
    assert torch.equal(out, x)
    for shift, step, what in ((1, 4, "load outside"), (-1, 4, "load outside"), (0, 3, "race")):
        with pytest.raises(InterpreterError, match=what):
            _stray_kernel[(2,)](x, out, SHIFT=shift, STEP=step)
    x = torch.zeros(12)
    with pytest.raises(InterpreterError, match="race"):  # reads what the other program writes
        _stray_kernel[(2,)](x, x, SHIFT=4, STEP=4)


@triton.jit
def _functions_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    right, wrong = logistic.sigmoids(x)
    value, slope = logistic.log1mexp(-tl.abs(x))
    tl.store(out_ptr + lane, right)
    tl.store(out_ptr + BLOCK + lane, wrong)
    tl.store(out_ptr + 2 * BLOCK + lane, logistic.log_sigmoid(x))
    tl.store(out_ptr + 3 * BLOCK + lane, value)
    tl.store(out_ptr + 4 * BLOCK + lane, slope)


def test_logistic_functions():
    """To a few units in the last place, element by element, from 1e-6 to 80."""
    half = torch.logspace(-6, 1.9, 2048)
    x = torch.cat([half, -half])
    out = torch.empty(5, 4096)
    _functions_kernel[(1,)](x, out, BLOCK=4096)
    wide = x.double()
    negative = -wide.abs()
    wanted = [
        wide.sigmoid(),
        (-wide).sigmoid(),
        -torch.nn.functional.softplus(-wide),
        torch.where(negative > -0.5, (-torch.expm1(negative)).log(), torch.log1p(-negative.exp())),
        1 / torch.expm1(negative),
    ]
    for got, exact in zip(out, torch.stack(wanted), strict=True):
        relative = ((got.double() - exact) / exact).abs().max()
        assert relative < 8 * torch.finfo(torch.float32).eps, relative
