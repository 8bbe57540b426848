"""queue_push_: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import reference
from ...ops.contrastive.queue_push_ import queue_push_
from ..entry import FLOAT_DTYPES, Benchmark, Op, Rejected, Sample, seeded


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def call(name: str, D: int, K: int, N: int, start: int) -> Sample:
        queue, keys = _randn(D, K, seed=1).to(dtype), _randn(N, D, seed=2).to(dtype)
        return Sample(name, (queue, torch.tensor([start]), keys))

    yield call("inside", 5, 40, 8, 3)
    yield call("to_the_end", 5, 40, 8, 32)
    yield call("around_the_end", 5, 40, 9, 35)
    yield call("around_the_end_by_one", 33, 40, 2, 39)
    yield call("whole_queue", 5, 40, 40, 7)
    yield call("more_than_the_queue", 5, 40, 103, 7)
    yield call("one_column", 3, 1, 5, 0)
    yield call("no_keys", 5, 40, 0, 17)
    yield call("no_features", 0, 40, 7, 17)
    yield call("large", 130, 300, 257, 111)
    yield call("larger", 40, 3000, 2500, 2600)
    queue, keys = _randn(6, 50, seed=3).to(dtype), _randn(20, 6, seed=4)
    yield Sample("pointer_of_no_dimensions", (queue, torch.tensor(44), keys.to(dtype)))
    for other in FLOAT_DTYPES:
        name = f"keys_in_{str(other).removeprefix('torch.')}"
        yield Sample(name, (queue, torch.tensor([44]), keys.to(other)))
    rows = _randn(50, 6, seed=5).to(dtype)
    yield Sample("queue_of_rows", (rows.t(), torch.tensor([44]), keys.to(dtype)))
    yield Sample(
        "sliced_queue",
        (_randn(9, 100, seed=6).to(dtype)[1:7, ::2], torch.tensor([44]), keys.to(dtype)),
    )
    yield Sample(
        "transposed_keys", (queue, torch.tensor([44]), _randn(6, 20, seed=7).to(dtype).t())
    )
    yield Sample("expanded_keys", (queue, torch.tensor([44]), keys[:1].to(dtype).expand(20, 6)))


def of_length(length: int) -> Sample:
    return Sample("", (_randn(4, 30, seed=1), torch.tensor([20]), _randn(length, 4, seed=2)))


def rejected() -> Iterator[Rejected]:
    queue, pointer, keys = _randn(3, 8, seed=1), torch.tensor([0]), _randn(2, 3, seed=2)
    yield Rejected("queue_type", ([1.0], pointer, keys), {}, TypeError, "queue: expected a tensor")
    yield Rejected("queue_dims", (queue[0], pointer, keys), {}, ValueError, "queue: expected 2")
    yield Rejected("queue_integers", (queue.long(), pointer, keys), {}, TypeError, "queue: .*dtype")
    yield Rejected("no_columns", (queue[:, :0], pointer, keys), {}, ValueError, "queue: .*K >= 1")
    yield Rejected("pointer_int", (queue, 0, keys), {}, TypeError, "pointer: expected a tensor")
    yield Rejected("pointer_int32", (queue, pointer.int(), keys), {}, TypeError, "pointer: .*int64")
    two = torch.tensor([0, 1])
    yield Rejected("two_pointers", (queue, two, keys), {}, ValueError, "pointer: expected one")
    meta = pointer.to("meta")
    yield Rejected("pointer_device", (queue, meta, keys), {}, ValueError, "pointer: .*device")
    yield Rejected("keys_type", (queue, pointer, None), {}, TypeError, "keys: expected a tensor")
    yield Rejected("keys_dims", (queue, pointer, keys[0]), {}, ValueError, "keys: expected 2")
    wide = _randn(2, 4, seed=3)
    yield Rejected("keys_shape", (queue, pointer, wide), {}, ValueError, r"keys: .*\(2, 3\)")
    yield Rejected(
        "keys_device", (queue, pointer, keys.to("meta")), {}, ValueError, "keys: .*device"
    )
    options = {"backend": "fastest"}
    yield Rejected("backend", (queue, pointer, keys), options, ValueError, "backend: .*'fastest'")


def eager(queue: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor) -> None:
    """MoCo's own code, for a batch that divides the queue: it reads the pointer on the host."""
    start = int(pointer)
    queue[:, start : start + len(keys)] = keys.T
    pointer[0] = (start + len(keys)) % queue.shape[1]


OP = Op(
    name="queue_push_",
    function=queue_push_,
    reference=reference.queue_push_,
    kernels=("queue_push_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="He 2020",
    summary="keys written into a ring buffer, in place",
    benchmarks=(
        Benchmark(
            name="256 x 128 into 65536",
            make=lambda dtype: Sample(
                "",
                (
                    _randn(128, 65536, seed=1).to(dtype),
                    torch.tensor([512]),
                    _randn(256, 128, seed=2).to(dtype),
                ),
            ),
            eager=eager,
            backward=False,
            bytes_moved=lambda s: 2 * s.args[2].numel() * s.args[2].element_size(),
        ),
    ),
)
