"""gae: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from ... import reference
from ...ops.policy.gae import gae
from ..entry import Benchmark, Op, Rejected, Sample, seeded


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def _inputs(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _randn(*shape, dtype=dtype, seed=0), _randn(*shape, dtype=dtype, seed=1)


def _flags(*shape: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed)) < share


def _all_flags(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "mask": _flags(*shape, share=0.7, seed=2),
        "terminated": _flags(*shape, share=0.15, seed=3),
        "truncated": _flags(*shape, share=0.15, seed=4),
    }


def _turned(value):
    return value.mT.contiguous() if isinstance(value, torch.Tensor) and value.dim() == 2 else value


def _by_time(sample: Sample) -> Sample:
    """The same call with time first."""
    kwargs = {name: _turned(x) for name, x in sample.kwargs.items()}
    args = tuple(_turned(x) for x in sample.args)
    return Sample(f"time_major_{sample.name}", args, {**kwargs, "time_major": True})


def _response(rows: int, length: int) -> torch.Tensor:
    """A run of tokens that count in each row, one row empty, one full, as of language models."""
    start = torch.linspace(0, length - 1, rows).long()
    stop = (start + torch.arange(rows) * length // 3).clamp(max=length)
    steps = torch.arange(length)
    mask = (steps >= start[:, None]) & (steps < stop[:, None])
    mask[rows // 2] = True
    return mask


def _flagged(dtype: torch.dtype) -> Iterator[Sample]:
    """Every set of flags, with every bootstrap, whole and in vectors with a rest."""
    for rows, length in ((19, 37), (34, 5)):
        inputs = _inputs(rows, length, dtype=dtype)
        flags = _all_flags(rows, length)
        bootstraps = {
            "none": None,
            "rows": _randn(rows, dtype=dtype, seed=5),
            "steps": _randn(rows, length, dtype=dtype, seed=6),
        }
        names = [n for k in range(4) for n in itertools.combinations(flags, k)]
        for chosen, (kind, bootstrap) in itertools.product(names, bootstraps.items()):
            name = f"{'_'.join(chosen) or 'plain'}_{kind}_{length}"
            kwargs = {n: flags[n] for n in chosen} | {"bootstrap": bootstrap}
            yield Sample(name, inputs, kwargs)
            yield _by_time(Sample(name, inputs, kwargs))


def _dirty(dtype: torch.dtype) -> Iterator[Sample]:
    rewards, values = _inputs(19, 50, dtype=dtype)
    after = _randn(19, 50, dtype=dtype, seed=6)
    for name, mask in (
        ("random", _flags(19, 50, share=0.5, seed=7)),
        ("response", _response(19, 50)),
        ("nothing", torch.zeros(19, 50, dtype=torch.bool)),
    ):
        spoiled = []
        for x, bad in ((rewards, torch.nan), (values, torch.inf), (after, torch.nan)):
            spoiled.append(torch.where(mask, x, torch.full_like(x, bad)))
        flags = {n: x | ~mask for n, x in _all_flags(19, 50).items() if n != "mask"}
        for whiten in (False, True):
            kwargs = {"mask": mask, "bootstrap": spoiled[2], "whiten": whiten, **flags}
            sample = Sample(f"dirty_{name}_{whiten}", (spoiled[0], spoiled[1]), kwargs)
            yield sample
            yield _by_time(sample)
    row = _randn(19, dtype=dtype, seed=8)
    row[0] = torch.nan  # of a row in which nothing counts
    mask = _response(19, 50)
    mask[0] = False
    spoiled = [torch.where(mask, x, torch.full_like(x, torch.nan)) for x in (rewards, values)]
    sample = Sample("dirty_row", tuple(spoiled), {"mask": mask, "bootstrap": row})
    yield sample
    yield _by_time(sample)


def _packed(dtype: torch.dtype) -> Iterator[Sample]:
    lengths = [3, 0, 1, 40, 16, 0, 17, 33, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    total, sequences = int(cu_seqlens[-1]), len(lengths)
    inputs = _inputs(total, dtype=dtype)
    flags = _all_flags(total)
    per_sequence = _randn(sequences, dtype=dtype, seed=5)
    for name, kwargs in (
        ("plain", {}),
        ("bootstrap", {"bootstrap": per_sequence}),
        ("steps", {"bootstrap": _randn(total, dtype=dtype, seed=6), **flags}),
        ("flags", {"bootstrap": per_sequence, "whiten": True, **flags}),
    ):
        yield Sample(f"packed_{name}", inputs, {"cu_seqlens": cu_seqlens, **kwargs})
    int32 = cu_seqlens.int()
    yield Sample("packed_int32", inputs, {"cu_seqlens": int32, "bootstrap": per_sequence})
    none = {"cu_seqlens": cu_seqlens[:1]}
    yield Sample("packed_no_sequences", (inputs[0][:0], inputs[1][:0]), none)
    every_other = (inputs[0].repeat_interleave(2)[::2], inputs[1])
    yield Sample("packed_strided", every_other, {"cu_seqlens": cu_seqlens})


def _strided(dtype: torch.dtype) -> Iterator[Sample]:
    wide = _randn(40, 80, dtype=dtype, seed=0)
    values = _randn(40, 80, dtype=dtype, seed=1)
    flags = _all_flags(40, 80)

    def of(name: str, cut: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Sample]:
        kwargs = {n: cut(x) for n, x in flags.items()}
        args = (cut(wide), cut(values))
        for whiten in (False, True):
            yield Sample(f"{name}_{whiten}", args, {**kwargs, "whiten": whiten})
        yield Sample(f"{name}_plain", args)
        yield Sample(f"{name}_time_major", args, {"time_major": True})

    yield from of("sliced", lambda x: x[1:, 3:])
    yield from of("every_other", lambda x: x[:, ::2])
    yield from of("transposed", lambda x: x.t())
    yield from of("transposed_back", lambda x: x.t().contiguous().t())
    yield from of("expanded", lambda x: x[:1].expand(20, 80))
    yield from of("expanded_steps", lambda x: x[:, :1].expand(40, 33))
    mixed = {"mask": flags["mask"].t().contiguous().t(), "bootstrap": wide[:, ::2][:, 3]}
    yield Sample("mixed_strides", (wide, values.t().contiguous().t()), mixed)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    inputs = _inputs(19, 37, dtype=dtype)
    yield Sample("plain", inputs, {"bootstrap": _randn(19, dtype=dtype, seed=5)})
    yield Sample("flags", inputs, {**_all_flags(19, 37), "whiten": True})
    yield Sample("time_major", inputs, {"time_major": True, **_all_flags(19, 37)})
    yield from _packed(dtype)
    yield from _flagged(dtype)
    yield from _dirty(dtype)
    yield from _strided(dtype)
    for gamma, gae_lambda in ((1, 1.0), (0.0, 0.9), (0.9, 0), (0.5, 0.5), (1.0, 0.3)):
        kwargs = {"gamma": gamma, "gae_lambda": gae_lambda, "mask": _response(19, 37)}
        yield Sample(f"gamma_{gamma}_{gae_lambda}", inputs, kwargs)
    number = {n: x.int() if n == "mask" else x.float() for n, x in _all_flags(19, 37).items()}
    yield Sample("numbers_as_flags", inputs, number)
    for length in (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33):
        for rows in (1, 18):
            few = _inputs(rows, length, dtype=dtype)
            yield Sample(f"{rows}_rows_of_{length}", few, {"whiten": True})
            yield Sample(f"{rows}_columns_of_{length}", few, {"time_major": True, "gamma": 0.9})
    yield Sample("no_rows", _inputs(0, 5, dtype=dtype), {"bootstrap": torch.zeros(0)})
    one = torch.zeros(19, 37, dtype=torch.bool)
    one[4, 7] = True
    yield Sample("one_step_whitened", inputs, {"mask": one, "whiten": True})
    spoiled = inputs[0].clone()
    spoiled.view(-1)[1] = torch.nan  # of a step that counts: it stays with the steps that count
    mask = torch.arange(spoiled.numel()).view(spoiled.shape) % 3 > 0
    yield Sample("nan_whitened", (spoiled, inputs[1]), {"mask": mask, "whiten": True})
    yield Sample("many_rows", _inputs(700, 40, dtype=dtype), {"whiten": True})
    yield Sample("many_columns", _inputs(40, 1300, dtype=dtype), {"time_major": True})
    yield Sample("long", _inputs(2, 5000, dtype=dtype), {"mask": _response(2, 5000)})
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    yield Sample("mixed_dtypes", (inputs[0], inputs[1].to(other)))
    yield Sample("float32_bootstrap", inputs, {"bootstrap": torch.linspace(0, 1, 19)})


def of_length(length: int) -> Sample:
    mask = _flags(3, length, share=0.7, seed=2)
    return Sample("", _inputs(3, length, dtype=torch.float32), {"mask": mask, "whiten": True})


def rejected() -> Iterator[Rejected]:
    x, n = torch.randn(3, 5), torch.randn(6)
    mask = torch.ones(3, 5, dtype=torch.bool)

    def call(name, message, error=ValueError, args=(x, x), **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "rewards: expected a tensor", TypeError, ([1.0], x))
    yield call("integers", "rewards: expected dtype", TypeError, (x.long(), x))
    yield call("one_dimension", r"rewards: expected 2 dim.*\(6,\)", args=(n, n))
    yield call("values_type", "values: expected a tensor", TypeError, (x, None))
    yield call("values_shape", r"values: expected shape \(3, 5\)", args=(x, x[:2]))
    yield call("values_device", "values: .*meta", args=(x, x.to("meta")))
    for name in ("gamma", "gae_lambda"):
        for bad in (-0.1, 1.1, float("nan")):
            yield call(f"{name}_{bad}", rf"{name}: .*in \[0, 1\]", **{name: bad})
        yield call(f"{name}_type", f"{name}: expected a number", TypeError, **{name: "1"})
    for name in ("mask", "terminated", "truncated"):
        yield call(f"{name}_shape", rf"{name}: .*\(3, 5\).*got \(5, 3\)", **{name: mask.t()})
        yield call(f"{name}_type", f"{name}: expected a tensor", TypeError, **{name: [1]})
        yield call(f"{name}_device", f"{name}: .*meta", **{name: mask.to("meta")})
    for name in ("whiten", "time_major"):
        yield call(name, f"{name}: expected True or False, got 1", TypeError, **{name: 1})
    yield call("bootstrap_shape", r"bootstrap: .*\(3,\).*got \(5,\)", bootstrap=x[0])
    yield call(
        "bootstrap_time", r"bootstrap: .*\(5,\).*got \(3,\)", bootstrap=x[:, 0], time_major=True
    )
    yield call("bootstrap_type", "bootstrap: expected a tensor", TypeError, bootstrap=0.0)
    yield call("bootstrap_device", "bootstrap: .*meta", bootstrap=x.to("meta"))

    def packed(name, message, error=ValueError, args=(n, n), **kwargs) -> Rejected:
        cu_seqlens = kwargs.pop("cu_seqlens", torch.tensor([0, 2, 6]))
        return Rejected(
            f"packed_{name}", args, {"cu_seqlens": cu_seqlens, **kwargs}, error, message
        )

    yield packed("dims", "rewards: expected 1 dim", args=(x, x))
    yield packed("time_major", "time_major: expected False", time_major=True)
    yield packed("float", "cu_seqlens: expected dtype", TypeError, cu_seqlens=n)
    yield packed("list", "cu_seqlens: expected a tensor", TypeError, cu_seqlens=[0, 6])
    yield packed("two_dims", "cu_seqlens: expected 1 dim", cu_seqlens=torch.tensor([[0, 6]]))
    yield packed("none", "cu_seqlens: expected at least one", cu_seqlens=torch.tensor([]).long())
    yield packed("device", "cu_seqlens: .*meta", cu_seqlens=torch.tensor([0, 6], device="meta"))
    yield packed("bootstrap", r"bootstrap: .*\(2,\).*\(6,\).*got \(3,\)", bootstrap=n[:3])
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float = 0.99, gae_lambda: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop over time that trainers write."""
    advantages = torch.zeros_like(rewards)
    carry, following = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + gamma * following - values[:, t] + gamma * gae_lambda * carry
        advantages[:, t] = carry
        following = values[:, t]
    return advantages, advantages + values


def _torchrl() -> dict[str, Callable]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def torchrl(rewards: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        arguments = (values, following, rewards, done, done)
        advantages, returns = vec_generalized_advantage_estimate(
            0.99, 0.95, *(x.unsqueeze(-1) for x in arguments)
        )
        return advantages.squeeze(-1), returns.squeeze(-1)

    return {"torchrl": torchrl}


def _benchmark(rows: int, length: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    return Benchmark(
        name=f"{rows} x {length}",
        make=lambda dtype: Sample("", _inputs(rows, length, dtype=dtype)),
        eager=eager,
        backward=False,
        # reads rewards and values, writes advantages and returns
        bytes_moved=lambda s: s.args[0].numel() * (2 * s.args[0].element_size() + 8),
        peers=(_torchrl,),
        floor={"copy of the inputs": lambda *inputs: tuple(x.clone() for x in inputs)},
        devices=devices,
        compiled=False,  # a loop of a thousand steps does not compile in reasonable time
    )


OP = Op(
    name="gae",
    function=gae,
    reference=reference.gae,
    kernels=("gae_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Schulman 2016",
    summary="generalised advantage estimation",
    benchmarks=(
        _benchmark(256, 1024),
        _benchmark(4096, 8),
        _benchmark(16, 65536),
        _benchmark(8192, 1024, devices=("cuda",)),
    ),
)
