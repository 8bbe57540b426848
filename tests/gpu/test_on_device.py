"""What only a GPU shows; all of it is skipped elsewhere. `benchmarks/gpu/quick` runs it.

Values and gradients on the device are the registry's (tests/ops/test_ops.py); here are streams,
graphs, other devices, sizes beyond 32 bits and calls that must not wait.
"""

from __future__ import annotations

import pytest
import torch

import apt_kernels
from apt_kernels import reference
from apt_kernels.calls import call, fresh
from apt_kernels.registry import OPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _backends(op) -> list[str]:
    found = apt_kernels.backends()["operations"][op.name]["cuda"]
    return [b for b in found if b != "reference"]


def _calls():
    for op in OPS.values():
        for backend in _backends(op) if torch.cuda.is_available() else ("device",):
            yield pytest.param(op, backend, id=f"{op.name}-{backend}")


def _sample(op):
    return next(iter(op.samples(op.dtypes[0])))


def _assert_same(got, wanted):
    for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, backend", list(_calls()))
def test_a_device_that_is_not_current(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    wanted = call(op.function, fresh(_sample(op), "cuda:0"), backend=backend)
    with torch.cuda.device(0):
        got = call(op.function, fresh(_sample(op), "cuda:1"), backend=backend)
    assert all(t.device.index == 1 for t in (*got[0], *got[1]))
    _assert_same(got, wanted)


@pytest.mark.parametrize("op, backend", list(_calls()))
def test_another_stream(op, backend):
    """The inputs are written by a long queue of work on the stream that the kernel must join."""
    wanted = call(op.function, fresh(_sample(op), "cuda"), backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample = fresh(_sample(op), "cuda")
        leaves = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]
        contents = [t.detach().clone() for t in leaves]
        for t in leaves:
            t.detach().zero_()
        torch.cuda._sleep(50_000_000)
        for t, content in zip(leaves, contents, strict=True):
            t.detach().copy_(content)
        got = call(op.function, sample, backend=backend)
    stream.synchronize()
    _assert_same(got, wanted)


@pytest.mark.parametrize("op, backend", list(_calls()))
def test_no_waiting_for_the_device(op, backend):
    sample = fresh(_sample(op), "cuda")
    call(op.function, sample, backend=backend)  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = op.function(*sample.args, **sample.kwargs, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(o) for o in ends])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, backend", list(_calls()))
def test_cuda_graph(op, backend):
    """Captured once, replayed on other values."""
    sample = fresh(_sample(op), "cuda")
    floats = [
        t
        for t in (*sample.args, *sample.kwargs.values())
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(op.function, sample, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op.function(*sample.args, **sample.kwargs, backend=backend)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        grads = ()
        if isinstance(first, torch.Tensor) and first.requires_grad:
            grads = torch.autograd.grad(first, floats, torch.ones_like(first), allow_unused=True)
    for t in floats:
        t.detach().mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    wanted = op.function(*sample.args, **sample.kwargs, backend=backend)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first.detach(), wanted.detach(), equal_nan=True)
    if grads:
        again = torch.autograd.grad(wanted, floats, torch.ones_like(wanted), allow_unused=True)
        for a, b in zip(grads, again, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("op, backend", list(_calls()))
def test_inductor_on_the_device(op, backend):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True)
    got = call(compiled, fresh(_sample(op), "cuda"), backend=backend)
    _assert_same(got, call(op.function, fresh(_sample(op), "cuda"), backend=backend))


@pytest.mark.parametrize("backend", ("triton", "native"))
def test_more_elements_than_32_bits_count(backend):
    rows, vocab = 16500, 131072  # 2.16e9 elements, 4.3 GB in bfloat16
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    if backend not in _backends(OPS["token_logprobs"]):
        pytest.skip(f"{backend} is not built")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-4:] = torch.randn(4, vocab, device="cuda")
    logits.requires_grad_()
    ids = torch.randint(0, vocab, (rows,), device="cuda")
    logps = apt_kernels.token_logprobs(logits, ids, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    last = logits.detach()[-4:].float().requires_grad_()
    wanted = reference.token_logprobs(last, ids[-4:])
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), last)
    torch.testing.assert_close(logps[-4:].float(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad[-4:].float(), wanted_grad, rtol=2e-2, atol=1e-6)
    assert (logps[:-4] + torch.log(torch.tensor(float(vocab)))).abs().max() < 1e-3
