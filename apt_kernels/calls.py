"""Calling operations on the registry's samples: values, gradients, the same call in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .registry import Op, Sample
from .testing import ULPS, assert_as_accurate, rounding_errors

# Three TF32 products hold 22 bits of a factor: on a GPU, one element of one sample is 5.1 ulps
# beyond twice the reference's error, where products of float32 stay within 1.
TF32_ULPS = {("linear_policy_loss", torch.float32): 6}


def map_tensors(value, change: Callable[[Tensor], Tensor]):
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def map_sample(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return Sample(sample.name, map_tensors(sample.args, change), map_tensors(sample.kwargs, change))


def tensors(sample: Sample) -> Iterator[Tensor]:
    for value in (*sample.args, *sample.kwargs.values()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor):
                yield item


def fresh(sample: Sample, device: str = "cpu") -> Sample:
    """The same call with leaves and memory of its own; strides stay as they are."""

    def change(t: Tensor) -> Tensor:
        content = torch.empty(0, dtype=torch.uint8, device=t.device)
        content = content.set_(t.detach().untyped_storage()).to(device, copy=True)
        moved = torch.empty(0, dtype=t.dtype, device=device)
        moved.set_(content.untyped_storage(), t.storage_offset(), t.shape, t.stride())
        return moved.requires_grad_(t.requires_grad)

    return map_sample(sample, change)


def in_float64(sample: Sample) -> Sample:
    def change(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return map_sample(sample, change)


def _flattened(outputs) -> Iterator[Tensor]:
    """The tensors of a result: of a tuple in order, of a dict (of metrics) by name."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    if isinstance(outputs, dict):
        outputs = [outputs[name] for name in sorted(outputs)]
    for output in outputs:
        yield from _flattened(output)


def call(function: Callable, sample: Sample, upstream_scale: float = 1.0, **kwargs):
    """(outputs, gradients): gradients of all differentiable inputs for a random upstream.

    The outputs of a function that works in place are its arguments."""
    outputs = function(*sample.args, **sample.kwargs, **kwargs)
    if outputs is None:  # in place: what the arguments are now
        outputs = tuple(tensors(sample))
    outputs = tuple(_flattened(outputs))
    inputs = [t for t in tensors(sample) if t.requires_grad]
    ends = [o for o in outputs if o.requires_grad]
    if not inputs:
        assert not ends
        return outputs, ()
    assert ends, "an input requires grad, but no output has a graph"
    generator = torch.Generator().manual_seed(7)
    upstream = [
        torch.empty(o.shape)
        .normal_(0, upstream_scale, generator=generator)
        .to(o.dtype)
        .to(o.device)
        for o in ends
    ]
    return outputs, torch.autograd.grad(ends, inputs, upstream)


def assert_results(op: Op, given: Sample, results, device="cpu", ulps: float = ULPS) -> None:
    """What `call` gave for this sample is as accurate as what the reference gives."""

    def exactly() -> tuple[Tensor, ...]:
        outputs, grads = call(op.reference, in_float64(fresh(given, device)))
        return *outputs, *grads

    outputs, grads = call(op.reference, fresh(given, device))
    assert [len(outputs), len(grads)] == [len(of_kind) for of_kind in results]
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"gradient {i}" for i in range(len(grads))]
    errors = functools.cache(lambda: rounding_errors(exactly))
    all_results = (*results[0], *results[1]), (*outputs, *grads), exactly()
    for i, (name, *triple) in enumerate(zip(names, *all_results, strict=True)):
        name = f"{name} of {given.name}"
        result, expected, exact = triple
        rounding = functools.partial(lambda i: errors()[i], i)
        assert_as_accurate(result, expected, exact, name, ulps, rounding=rounding)


def assert_as_the_reference(op: Op, sample: Sample, device: str, backend: str) -> None:
    """Values and gradients as accurate as the reference's, the same twice, the inputs untouched."""
    given, sample = sample, fresh(sample, device)
    before = map_sample(sample, lambda t: t.detach().clone())
    outputs, grads = call(op.function, sample, backend=backend)
    dtype = next((t.dtype for t in tensors(given) if t.is_floating_point()), None)
    ulps = ULPS
    if device == "cuda" and dtype is not None:
        ulps = TF32_ULPS.get((op.name, dtype), ULPS)
    assert_results(op, given, (outputs, grads), device, ulps)

    again, grads_again = call(op.function, fresh(given, device), backend=backend)
    for first, second in zip((*outputs, *grads), (*again, *grads_again), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    if not op.function.__name__.endswith("_"):
        for now, then in zip(tensors(sample), tensors(before), strict=True):
            torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)
