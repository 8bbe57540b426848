"""The contrastive launchers under the interpreter. Run by test_triton_interpreter.py.

The registry's samples that show most in least time; what a launcher is told beyond the public
functions (the rows of one rank against those of all); seeded bugs. Bounds and races are checked by
the interpreter's repairs throughout.
"""

import importlib
import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py instead"

import pytest
import torch
import triton_checks as checks
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

import apt_kernels.triton as kernels
from apt_kernels import dispatch
from apt_kernels.calls import assert_as_the_reference
from apt_kernels.registry import OPS, Sample
from apt_kernels.registry.contrastive.similarity import near, rows, temperature
from ops.contrastive.test_contrastive import test_rows_that_are_not_finite_are_seen  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {
    (op, dtype, sample.name): sample
    for op in ("info_nce", "nt_xent", "siglip_loss", "sup_con_loss")
    for dtype in DTYPES
    for sample in OPS[op].samples(dtype)
}
PAIRS = (
    "temperature", "none", "scale_100", "no_similar_column", "unnormalised_large", "67_by_31",
    "zero_rows", "short_and_long_rows", "equal_embeddings", "frozen_first", "frozen_second",
    "temperature_alone", "1_by_7",
)  # fmt: skip
STRIDED = ("sliced", "every_other_column", "transposed", "expanded")
SAMPLES = {
    "info_nce": (
        *PAIRS, *STRIDED, *(f"symmetric_{name}" for name in PAIRS[:6]), "negatives_67_by_31",
        "negatives_scale_100", "negatives_zero_rows", "negatives_unnormalised", "label_offset_9",
        "label_offset_none", "more_rows_than_tiles", "no_keys", "queue_sharp", "queue_slice",
        "queue_of_float32", "no_negatives", "no_rows_negatives",
    ),
    "nt_xent": PAIRS,
    "siglip_loss": (
        *PAIRS, "label_offset_9", "bias_alone", "bias_-50.0_none", "bias_4.0_scale_100"
    ),
    "sup_con_loss": (
        "views_scale_100", "views_unnormalised_large", "views_zero_rows", "65_of_20_sharp",
        "65_of_20", "no_positives", "one_label", "some_without", "any_labels", "strided",
        "equal_embeddings", "labels_torch.int32",
    ),
}  # fmt: skip
HALF = {  # float16 differs in the products of the gradient alone
    torch.bfloat16: (
        "none", "67_by_31", "symmetric_67_by_31", "negatives_67_by_31", "queue_of_float32",
        "zero_rows", "transposed", "65_of_20_sharp",
    ),
    torch.float16: ("none", "67_by_31", "queue_of_float32", "65_of_20"),
}  # fmt: skip


def _samples():
    for op, names in SAMPLES.items():
        for dtype in DTYPES:
            for name in names:
                if name in HALF.get(dtype, names):
                    yield pytest.param(op, dtype, name, id=f"{op}-{str(dtype)[6:]}-{name}")


def _check(op, sample, backend="triton"):
    if isinstance(sample, str):
        sample = BY_NAME[op, torch.float32, sample]
    assert_as_the_reference(OPS[op], sample, "cpu", backend)


@pytest.mark.parametrize("op, dtype, name", _samples())
def test_registry_samples(op, dtype, name):
    _check(op, BY_NAME[op, dtype, name])


@pytest.mark.parametrize("bias", (-4.5, -4.0, -3.5, -3.0, -2.5))
def test_the_logarithm_of_a_sum_near_1_keeps_its_digits(bias):
    """log(1 + e) of an e somewhat above 0.01, where 1 + e would have lost digits of it."""
    x = torch.eye(32)[:16].contiguous()
    options = {"temperature": 0.1, "logit_bias": bias, "reduction": "none"}
    _check("siglip_loss", Sample("", (x, x.clone()), options))
    options = {"temperature": 0.05 * -bias, "reduction": "none"}
    _check("info_nce", Sample("", (x[:3], x[:3].clone()), options))


def _small_tiles(monkeypatch, namespace=kernels):
    """Several steps of every loop: 16 rows, columns and elements at a time, two tiles a wave."""

    def module(name):
        return importlib.import_module(f"{namespace.__name__}.contrastive.{name}")

    small = module("similarity").Tiles(16, 16, 16, 16, warps=4, stages=2)
    for name in ("similarity_softmax", "similarity_gradient", "siglip_loss"):
        monkeypatch.setattr(module(name), "tiles", lambda *_, **__: small)
    monkeypatch.setattr(module("similarity_softmax"), "SLOTS", 2)
    monkeypatch.setattr(module("similarity_softmax"), "PROGRAMS", 6)
    monkeypatch.setattr(module("siglip_loss"), "PROGRAMS", 6)


def _views(count, width=20, dtype=torch.float32):
    x = rows(count, width, dtype)
    return Sample("", (x, near(x)), {"temperature": temperature(0.5), "reduction": "none"})


@pytest.mark.parametrize(
    "op, sample",
    [
        ("nt_xent", _views(25)),  # an even number of blocks: one lies half way around
        ("nt_xent", _views(37)),  # an odd one
        ("info_nce", _views(37)),
        ("info_nce", "symmetric_17_by_33"),
        ("info_nce", "negatives_17_by_33"),
        ("siglip_loss", _views(37)),
        ("sup_con_loss", "40_of_5"),
    ],
)
def test_several_waves_and_parts(op, sample, monkeypatch):
    _small_tiles(monkeypatch)
    _check(op, sample)


def _assert_close(actual, expected):
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_one_rank_against_all(monkeypatch):
    """They give what they give among all rows: the launches of process groups."""
    _small_tiles(monkeypatch)
    N, options = 20, (None, 0.5, True)
    x, y = (t.detach() for t in _views(N).args)
    classes, weights = torch.cat([x, y]), torch.randn(2 * N)
    *results, stats, _ = kernels.nt_xent_fwd(x, y, *options, True)
    grad = kernels.nt_xent_bwd(weights, x, y, *options, stats)
    for view, label in ((slice(3, 17), N + 3), (slice(N + 3, N + 17), 3)):
        own = classes[view]
        offsets = (label, view.start)
        *some, own_stats, _, _ = kernels.info_nce_fwd(
            own, classes, None, *options, False, *offsets, True
        )
        _assert_close(some, [t[view] for t in results])
        some_grad, *_ = kernels.info_nce_bwd(
            weights[view], weights, own, classes, None, *options, *offsets, own_stats, stats,
            True, False, False,
        )  # fmt: skip
        _assert_close([some_grad], [grad[view]])

    labels, own = torch.arange(2 * N) % 7, slice(11, 30)
    *results, stats, _ = kernels.sup_con_loss_fwd(classes, labels, None, None, *options, 0, True)
    grad = kernels.sup_con_loss_bwd(
        weights, None, classes, labels, None, None, *options, 0, stats, None
    )
    inputs = (classes[own], labels[own], classes, labels, *options, 11)
    *some, own_stats, _ = kernels.sup_con_loss_fwd(*inputs, True)
    _assert_close(some, [t[own] for t in results])
    some_grad = kernels.sup_con_loss_bwd(weights[own], weights, *inputs, own_stats, stats)
    _assert_close([some_grad], [grad[own]])

    bias = (None, -3.0, True)
    inputs = (weights[:N], None, x, y, None, 0.5, *bias, 0)
    grad, other = kernels.siglip_loss_bwd(*inputs, True, True)
    inputs = (None, weights[:N], y[own], x, None, 0.5, *bias, 11)
    _assert_close([kernels.siglip_loss_bwd(*inputs, True, False)[0]], [other[own]])
    assert grad.any()


@pytest.mark.parametrize("bad", (0.0, -1.0, torch.nan, torch.inf))
@pytest.mark.parametrize("op", SAMPLES)
def test_a_wrong_temperature_in_a_tensor_gives_nan(op, bad):
    x, y = _views(3).args
    y = torch.tensor([0, 1, 0]) if op == "sup_con_loss" else y
    loss = OPS[op].function(x, y, temperature=torch.tensor(bad), backend="triton")
    assert loss.isnan()


def test_zero_rows_launch_nothing(monkeypatch):
    def launched(*args, **kwargs):
        raise AssertionError("a kernel was launched for no rows")

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    for op, name in (
        ("info_nce", "no_rows"), ("info_nce", "symmetric_no_rows"),
        ("nt_xent", "no_rows"), ("siglip_loss", "no_rows"), ("sup_con_loss", "views_no_rows"),
    ):  # fmt: skip
        _check(op, name)


def test_products_done(monkeypatch):
    """In units of all pairs x D: what the headers of the operations promise."""
    N, D = 256, 16
    work = [0]
    dot = InterpreterBuilder.create_dot

    def count(self, a, b, *rest):
        work[0] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)

    def units(op, *args, **kwargs):
        done = []
        work[0] = 0
        loss = OPS[op].function(*args, **kwargs, backend="triton")
        done.append(work[0] / (N * N * D))
        work[0] = 0
        torch.autograd.grad(loss, [t for t in args if t.requires_grad])
        return *done, work[0] / (N * N * D)

    x, y = rows(N, D, torch.float32), rows(N, D, torch.float32, seed=1)
    # of four blocks of rows three distances: none, one, and two, which is half way around
    assert units("nt_xent", x[: N // 2], y[: N // 2]) == (3 / 4, 2)
    assert units("sup_con_loss", x, torch.arange(N) % 9) == (3 / 4, 2)
    assert units("info_nce", x, y, symmetric=True) == (1, 4)
    assert units("info_nce", x, y.detach()) == (1, 2)
    assert units("siglip_loss", x, y) == (1, 4)


class _Allocated(TorchDispatchMode):
    """Notes the largest result."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("op", SAMPLES)
def test_memory_is_linear(op, monkeypatch):
    """No tensor of more than some hundred elements a row, however many rows there are."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    used = []
    for N in (16384, 32768):
        x, y = (torch.ones(N, 8, requires_grad=True) for _ in range(2))
        y = torch.zeros(N, dtype=torch.long) if op == "sup_con_loss" else y
        kwargs = {"symmetric": True} if op == "info_nce" else {}
        with _Allocated() as allocated:
            loss = OPS[op].function(x, y, **kwargs, backend="triton")
            loss.backward()
        used.append(allocated.largest / N)
    assert used[0] == used[1] < 500


def test_offsets_beyond_32_bits():
    far = checks.sparse((3, 2**31 + 24), torch.bfloat16)
    x = torch.randn(3, 20).bfloat16()
    far[:, -23:-3].copy_(x)
    options = {"symmetric": True, "normalize": True, "backend": "triton"}
    results = []
    for leaf in (x, far[:, -23:-3]):
        leaf = leaf.detach().requires_grad_()
        loss = OPS["info_nce"].function(leaf, leaf.flip(0).detach(), **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        moco = OPS["info_nce"].function(
            x.flip(0), leaf, negatives=leaf.detach(), temperature=1.0, backend="triton"
        )
        results[-1] += torch.autograd.grad(moco, leaf)
    for near_result, far_result in zip(*results, strict=True):
        assert near_result.any()
        torch.testing.assert_close(far_result, near_result, rtol=0, atol=0)


def _on(op, sample, small=False):
    """A check of a namespace of kernels by a sample."""

    def check(bugged, monkeypatch):
        if small:
            _small_tiles(monkeypatch, bugged)
        dispatch.add_backend("bugged", bugged)
        _check(op, sample, "bugged")

    return check


_even = _on("nt_xent", _views(25), small=True)
_symmetric = _on("info_nce", "symmetric_none")
_plain = _on("info_nce", "temperature")
_queue = _on("info_nce", "negatives_temperature")
_siglip = _on("siglip_loss", "label_offset_9")
_labels = _on("sup_con_loss", "40_of_5")
_equal = "equal_embeddings"

# (what was done, in which file, the text, what it becomes, the check that must notice)
SEEDED = [
    ("reads a row beyond the end", "contrastive/similarity",
     "live = row < N", "live = row <= N", _plain),
    ("reads past the width", "contrastive/similarity",
     "inside = column < D", "inside = column <= D",
     _on("info_nce", "sliced")),
    ("swaps the strides", "contrastive/similarity",
     "column[:, None] * b_step", "column[:, None] * b_stride",
     _on("info_nce", "transposed")),
    ("gives a zero row a direction", "contrastive/similarity", "0.0, inverse)", "1e12, inverse)",
     _on("nt_xent", "zero_rows")),
    ("takes any temperature", "contrastive/similarity",
     "(t > 0.0) & (t < float(\"inf\"))", "t > -100.0",
     lambda bugged, _: _check_nan(bugged)),
    ("cuts the bits of float32 off", "contrastive/similarity",
     "+ 0x1000) & -0x2000", "+ 0x100000) & -0x200000",
     _on("nt_xent", BY_NAME["nt_xent", torch.float16, "none"])),
    ("never rescales", "contrastive/similarity_softmax", "total * old + other_total * new",
     "total + other_total", _even),
    ("loses the guard of -inf", "contrastive/similarity_softmax",
     "tl.where(top == -INFINITY, 0.0, top)", "top",
     _even),
    ("takes a pair twice", "contrastive/similarity_softmax",
     "(2 * (first + t) != blocks)", "(blocks > 0)",
     _even),
    ("takes the diagonal twice", "contrastive/similarity_softmax",
     "tl.where(column_block == row_block, -INFINITY, d)", "d", _even),
    ("forgets a tile", "contrastive/similarity_softmax",
     "row_blocks // 2 + 1", "row_blocks // 2", _even),
    ("keeps the row itself", "contrastive/similarity_softmax",
     "out = own | at_offset(row, column, self_offset, False)", "out = own", _even),
    ("shares a slot", "contrastive/similarity_softmax", "slot = t\n", "slot = 0\n", _even),
    ("forgets the columns of a wave", "contrastive/similarity_softmax", "_merge(column_part, size,",
     "_merge(column_part, 1,", _even),
    ("loses the weighted sum", "contrastive/similarity_softmax",
     "(weighted + moved) * old", "weighted * old",
     _on("info_nce", _views(25), small=True)),
    ("counts itself as a positive", "contrastive/similarity_softmax",
     "same & (d != -INFINITY)", "same",
     _labels),
    ("forgets the columns' share", "contrastive/similarity_gradient",
     "coefficient += column_weight[None, :] * p", "coefficient += 0 * p", _symmetric),
    ("forgets the projection", "contrastive/similarity_gradient",
     "grad - along[:, None] * unit", "grad",
     _plain),
    ("writes past the width", "contrastive/similarity_gradient", "part_live = part < D",
     "part_live = part < D + 8", _plain),
    ("pulls a row to itself", "contrastive/similarity_gradient",
     "out | at_offset(row, column, self_offset, False) |", "out |",
     _on("nt_xent", "unnormalised_large")),
    ("forgets the positive", "contrastive/similarity_gradient",
     "grad += positive[:, None] * unit\n    if own",
     "pass\n    if own", _plain),
    ("pulls by the wrong row", "contrastive/similarity_gradient",
     "tl.where(own < M, own, row - label_offset)",
     "tl.where(own < M, own, 0)", _even),
    ("forgets the positives of a label", "contrastive/similarity_gradient",
     "tl.where(same, coefficient - both, coefficient)", "coefficient", _labels),
    ("forgets the bias", "contrastive/similarity_gradient",
     "sigmoid(d * scale + bias)", "sigmoid(d * scale)",
     _siglip),
    ("calls equals right", "contrastive/info_nce",
     "alone | (positive > m)", "alone | (positive >= m)",
     _on("info_nce", _equal)),
    ("slope of all classes", "contrastive/info_nce", "share * mean", "mean", _plain),
    ("forgets the key's projection", "contrastive/info_nce",
     "grad - positive[:, None] * b", "grad", _queue),
    ("one program writes all keys", "contrastive/info_nce",
     "to = grad_ptr + row.to(tl.int64)[:, None] * D",
     "to = grad_ptr + 0 * row.to(tl.int64)[:, None] * D",
     _on("info_nce", "negatives_67_by_31")),
    ("takes the first part alone", "contrastive/siglip_loss", "for split in range(0, splits)",
     "for split in range(0, 1)", _on("siglip_loss", _views(37), small=True)),
    ("pushes the positive away", "contrastive/siglip_loss",
     "tl.where(own, -sigmoid(x), sigmoid(x))",
     "sigmoid(x)", _on("siglip_loss", "temperature")),
    ("calls equals right in a label", "contrastive/sup_con_loss", "best > best_negative",
     "best >= best_negative", _on("sup_con_loss", _equal)),
]  # fmt: skip


def _check_nan(bugged):
    x, y = (t.detach() for t in _views(3).args)
    losses, *_ = bugged.siglip_loss_fwd(x, y, torch.tensor(-1.0), 1.0, None, -10.0, True, 0, False)
    assert losses.isnan().all()


@pytest.fixture
def no_backend_left():
    yield
    for table in (dispatch._KERNELS, dispatch._BACKENDS):
        for key, value in list(table.items()):
            if key[1] == "bugged":
                del table[key]
            elif isinstance(value, tuple):
                table[key] = tuple(name for name in value if name != "bugged")


@pytest.mark.parametrize("bug", SEEDED, ids=lambda bug: bug[0].replace(" ", "_"))
def test_seeded_bugs_are_noticed(bug, seeded, monkeypatch, no_backend_left):
    _, stem, text, replacement, check = bug
    bugged = seeded(stem, text, replacement)
    with pytest.raises((AssertionError, InterpreterError)):
        check(bugged, monkeypatch)


def test_a_copy_without_a_bug_passes(seeded, monkeypatch, no_backend_left):
    same = seeded("rows", "ALIGN", "ALIGN")
    for check in (_even, _queue, _siglip, _labels):  # the others' samples are run above
        with monkeypatch.context() as patch:
            check(same, patch)
