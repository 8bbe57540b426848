"""Every operation of the registry, on every backend that is here, in every dtype."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import apt_kernels
from apt_kernels import dispatch
from apt_kernels.calls import assert_as_the_reference, call, fresh, tensors
from apt_kernels.registry import OPS

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ONLY_BACKEND = os.environ.get("APT_TEST_BACKEND")


# Triton's interpreter takes seconds for a hundred thousand elements. Samples beyond this are run by
# the other backends; the kernels see several blocks of every loop in smaller ones.
MOST_INTERPRETED = 20_000


def _too_slow(backend: str, sample) -> bool:
    if backend != "triton" or not dispatch.INTERPRETING_TRITON:
        return False
    return sum(t.numel() for t in tensors(sample)) > MOST_INTERPRETED


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cases():
    for op in OPS.values():
        for device in DEVICES:
            for backend in apt_kernels.backends()["operations"][op.name][device]:
                if ONLY_BACKEND not in (None, backend):
                    continue
                for dtype in op.dtypes:
                    if dtype == torch.float64 and (
                        backend not in ("native", "reference") or device != "cpu"
                    ):
                        continue  # GPU kernels have no float64
                    for sample in op.samples(dtype):
                        if _too_slow(backend, sample):
                            continue
                        name = f"{op.name}-{device}-{backend}-{_name(dtype)}-{sample.name}"
                        yield pytest.param(op, device, backend, sample, id=name)


def _each(kind: str):
    for op in OPS.values():
        for item in getattr(op, kind)():
            yield pytest.param(op, item, id=f"{op.name}-{item.name}")


def _each_sample(count: int | None = None):
    for op in OPS.values():
        for sample in list(op.samples(op.dtypes[0]))[:count]:
            yield pytest.param(op, sample, id=f"{op.name}-{sample.name}")


def _has_kernels(op) -> bool:
    return "native" in apt_kernels.backends()["operations"][op.name]["cpu"]


@pytest.mark.parametrize("op, device, backend, sample", list(_cases()))
def test_values_and_gradients(op, device, backend, sample):
    assert_as_the_reference(op, sample, device, backend)


@pytest.mark.parametrize("op, sample", list(_each_sample()))
def test_upstream_gradient_scales(op, sample):
    _, grads = call(op.function, fresh(sample))
    _, scaled = call(op.function, fresh(sample), upstream_scale=0.25)  # a power of two: exact
    _, zero = call(op.function, fresh(sample), upstream_scale=0.0)
    for grad, quarter, none in zip(grads, scaled, zero, strict=True):
        finite = torch.isfinite(grad)
        torch.testing.assert_close(quarter[finite], grad[finite] * 0.25, rtol=1e-6, atol=1e-30)
        assert (none[finite] == 0).all()


def _differentiable(count: int):
    for op in OPS.values():
        samples = [s for s in op.samples(op.dtypes[0]) if any(t.requires_grad for t in tensors(s))]
        for sample in samples[:count]:
            yield pytest.param(op, sample, id=f"{op.name}-{sample.name}")


@pytest.mark.parametrize("op, sample", list(_differentiable(3)))
def test_a_retained_graph_gives_its_gradients_again(op, sample):
    """Each is added in place to `.grad`, which must not be what the graph keeps."""
    sample = fresh(sample)
    leaves = [t for t in tensors(sample) if t.requires_grad]
    outputs = op.function(*sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(o.sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)
    once = [grad.clone() for grad in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        for leaf, grad in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, times * grad, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("op, sample", list(_differentiable(1)))
def test_a_second_derivative_is_an_error_that_names_the_reference(op, sample):
    """Also where the upstream gradient has no graph: constants would be wrong in silence."""
    if not _has_kernels(op):
        pytest.skip(f"{op.name} has no kernels here: the reference computes it")
    sample = fresh(sample)
    leaves = [t for t in tensors(sample) if t.requires_grad]
    outputs = op.function(*sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(o.sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(grad.sum() for grad in grads).backward()


@pytest.mark.parametrize("op, case", list(_each("rejected")))
def test_wrong_arguments_are_rejected(op, case):
    with pytest.raises(case.error, match=case.message):
        op.function(*case.args, **case.kwargs)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_what_is_no_argument_at_all_is_refused_by_name(op):
    signature = inspect.signature(op.function)
    sample = next(iter(op.samples(op.dtypes[0])))
    for name, parameter in signature.parameters.items():
        bound = signature.bind(*sample.args, **sample.kwargs)
        is_choice = isinstance(parameter.default, str)
        bound.arguments[name] = ["not hashable"] if is_choice else object()
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got "):
            op.function(*bound.args, **bound.kwargs)


class _Calls(TorchDispatchMode):
    """Notes every call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("apt", "apt_triton"):
            self.seen.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _of_operators():
    for op in OPS.values():
        if not _has_kernels(op):
            continue
        for sample in list(op.samples(op.dtypes[0]))[: 4 if ONLY_BACKEND == "triton" else None]:
            if not _too_slow(ONLY_BACKEND or "native", sample):
                yield pytest.param(op, sample, id=f"{op.name}-{sample.name}")


def test_every_operation_with_kernels_has_them_here():
    for op in OPS.values():
        assert _has_kernels(op) == bool(op.kernels and dispatch._extension), op.name


@pytest.mark.parametrize("op, sample", list(_of_operators()))
def test_opcheck(op, sample, monkeypatch):
    backend = ONLY_BACKEND or "native"
    if backend == "triton":  # outside torch.compile its launchers are called as they are
        for kernel in op.kernels:
            monkeypatch.setitem(dispatch._KERNELS, (kernel, backend), dispatch._TRACED[kernel])
    with _Calls() as calls:
        call(op.function, fresh(sample), backend=backend)
    assert calls.seen
    for function, args, kwargs in calls.seen:
        torch.library.opcheck(function, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op, sample", list(_each_sample(4)))
def test_one_graph(op, sample):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    outputs, grads = call(compiled, fresh(sample), backend=ONLY_BACKEND)
    eager_outputs, eager_grads = call(op.function, fresh(sample), backend=ONLY_BACKEND)
    for got, wanted in zip((*outputs, *grads), (*eager_outputs, *eager_grads), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, sample", list(_each_sample(1)))
def test_inductor(op, sample):
    torch._dynamo.reset()
    outputs, grads = call(torch.compile(op.function, fullgraph=True), fresh(sample))
    eager_outputs, eager_grads = call(op.function, fresh(sample))
    for got, wanted in zip((*outputs, *grads), (*eager_outputs, *eager_grads), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_no_recompilation_for_new_lengths(op):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.function, fullgraph=True, backend=counter)
    for length in (5, 6, 9, 14, 23):
        call(compiled, fresh(op.of_length(length)), backend=ONLY_BACKEND)
    assert counter.frame_count <= 2, "one static graph, one for all other lengths"


def _with_cast_factors(op, dtype):
    """The operation on factors that are cast by hand as autocast casts them; others stay."""
    signature = inspect.signature(op.function)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        factors = {n: t for n, t in bound.arguments.items() if n in op.autocast and t is not None}
        if all(t.dtype != torch.float64 for t in factors.values()):
            bound.arguments.update({n: t.to(dtype) for n, t in factors.items()})
        return op.function(*bound.args, **bound.kwargs)

    return function


def _assert_equal(results, wanted):
    for got, expected in zip((*results[0], *results[1]), (*wanted[0], *wanted[1]), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def _of_autocast():
    for op in OPS.values():
        for dtype in [d for d in op.dtypes if d in (torch.float32, torch.bfloat16, torch.float64)]:
            for sample in list(op.samples(dtype))[: None if op.autocast else 1]:
                yield pytest.param(op, sample, id=f"{op.name}-{_name(dtype)}-{sample.name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize("op, sample", list(_of_autocast()))
def test_autocast_casts_the_factors_of_products_alone(op, sample, dtype):
    """Bit for bit; gradients arrive in the dtype of the inputs. float64 is left alone."""
    for device in DEVICES:
        wanted = call(_with_cast_factors(op, dtype), fresh(sample, device), backend=ONLY_BACKEND)
        function = torch.autocast(device, dtype=dtype)(op.function)  # backward is outside
        results = call(function, fresh(sample, device), backend=ONLY_BACKEND)
        _assert_equal(results, wanted)


@pytest.mark.parametrize("op, sample", list(_each_sample(1)))
def test_autocast_in_one_graph(op, sample):
    torch._dynamo.reset()

    def inside(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op.function(*args, **kwargs)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = call(op.function, fresh(sample), backend=ONLY_BACKEND)
        compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
        around = call(compiled, fresh(sample), backend=ONLY_BACKEND)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    for results in (around, call(compiled, fresh(sample), backend=ONLY_BACKEND)):
        for got, expected in zip((*results[0], *results[1]), (*wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, sample", [p for p in _differentiable(1) if _has_kernels(p.values[0])])
def test_functorch_is_refused(op, sample):
    leaves = [t for t in tensors(sample) if t.requires_grad]

    def loss(x):
        outputs = op.function(*(x if a is leaves[0] else a for a in sample.args), **sample.kwargs)
        return (outputs[0] if isinstance(outputs, tuple) else outputs).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(leaves[0].detach())
