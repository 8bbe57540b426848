"""token_logprobs: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ... import reference
from ...ops.logprobs.token_logprobs import token_logprobs
from ..entry import Benchmark, Op, Rejected, Sample, seeded


def _logits(*shape: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _ids(*shape: int, vocab: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=seeded(seed))


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def logits(*shape: int, **kwargs) -> torch.Tensor:
        return _logits(*shape, dtype=dtype, **kwargs)

    x = logits(3, 5, 37).requires_grad_()
    ids = _ids(3, 5, vocab=37)
    yield Sample("plain", (x, ids))
    yield Sample("entropy", (x, ids), {"return_entropy": True})
    yield Sample("temperature", (x, ids), {"temperature": 0.7, "return_entropy": True})
    rows = torch.linspace(0.3, 2.0, 15).view(3, 5)
    yield Sample("temperature_per_row", (x, ids), {"temperature": rows, "return_entropy": True})
    yield Sample("softcap", (x, ids), {"softcap": 5.0, "temperature": 1.3, "return_entropy": True})
    yield Sample("several_ids", (x, _ids(3, 5, 4, vocab=6)), {"return_entropy": True})
    yield Sample("one_dimension", (logits(37).requires_grad_(), _ids(vocab=37)))
    yield Sample("four_dimensions", (logits(2, 2, 3, 9).requires_grad_(), _ids(2, 2, 3, vocab=9)))
    yield Sample("int32_ids", (x, ids.int()))

    for vocab in (1, 2, 15, 16, 17, 127, 1023, 1025, 2053, 50257):
        rows = 2 if vocab > 10_000 else 5
        last = torch.full((rows,), vocab - 1)
        x = logits(rows, vocab, seed=vocab).requires_grad_()
        yield Sample(f"last_column_of_{vocab}", (x, last), {"return_entropy": True})
    yield Sample("large_logits", (logits(4, 1000, scale=300).requires_grad_(), _ids(4, vocab=1000)))
    flat = torch.full((4, 300), 80.0, dtype=dtype).requires_grad_()
    yield Sample("equal_logits", (flat, _ids(4, vocab=300)), {"return_entropy": True})
    rising = torch.linspace(-60, 60, 4000).expand(2, -1).to(dtype).contiguous().requires_grad_()
    yield Sample("rising_maximum", (rising, _ids(2, vocab=4000)), {"return_entropy": True})

    excluded = logits(4, 40)
    excluded[:, 33:] = -torch.inf
    excluded[1, :20] = -torch.inf
    excluded[2, :32] = -torch.inf
    excluded = excluded.requires_grad_()
    yield Sample(
        "excluded_columns",
        (excluded, torch.tensor([0, 25, 32, 39])),
        {"return_entropy": True, "temperature": 1.5},
    )
    yield Sample(
        "excluded_columns_softcap",
        (excluded, torch.tensor([0, 25, 32, 3])),
        {"return_entropy": True, "softcap": 4.0},
    )
    least = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
    masked = logits(4, 300)
    masked[:3] = least  # the mask of a model: all columns, all but some, all but one
    masked[1, :8] = -least
    masked[2, 7] = 5
    options = {"return_entropy": True}
    columns = (masked.requires_grad_(), torch.tensor([7, 7, 7, 8]))
    yield Sample("columns_of_the_least_number", columns, options)
    narrow = torch.full((2, 4), torch.finfo(dtype).min, dtype=dtype).requires_grad_()
    yield Sample("rows_of_the_least_number", (narrow, torch.tensor([0, 3])), options)
    nothing = logits(3, 20)
    nothing[1] = -torch.inf
    yield Sample("row_of_minus_infinity", (nothing.requires_grad_(), _ids(3, vocab=20)))
    unknown = logits(3, 1300)
    unknown[0, :1024] = torch.nan
    unknown[1, :1100] = -torch.inf
    unknown[1, 500] = torch.nan
    options = {"return_entropy": True}
    yield Sample("nan_first", (unknown.requires_grad_(), _ids(3, vocab=1300)), options)

    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    dirty = logits(3, 5, 37)
    dirty[0, 1], dirty[1, 2] = torch.nan, torch.inf
    dirty = dirty.requires_grad_()
    dirty_ids = ids.masked_fill(mask == 0, -100)
    for name, m in (("mask", mask.bool()), ("mask_int", mask), ("mask_float", mask.float())):
        yield Sample(name, (dirty, dirty_ids), {"mask": m, "return_entropy": True})
    yield Sample("all_masked", (dirty, dirty_ids), {"mask": torch.zeros(3, 5)})
    yield Sample("expanded_mask", (logits(3, 5, 37), ids), {"mask": mask[:1].expand(3, 5)})

    wide = logits(4, 7, 60).requires_grad_()
    ids = _ids(4, 7, vocab=30)
    options = {"return_entropy": True, "mask": _ids(4, 7, vocab=2, seed=3)}
    yield Sample("sliced_time", (wide[:, :-1], ids[:, 1:]), {"return_entropy": True})
    yield Sample("sliced_vocabulary", (wide[..., 3:50], ids), options)
    yield Sample("every_other_column", (wide[..., ::2], ids), options)
    yield Sample("transposed_rows", (wide.transpose(0, 1), ids.t()), {"return_entropy": True})
    yield Sample("transposed_vocabulary", (wide.transpose(1, 2), _ids(4, 60, vocab=7)))
    yield Sample("expanded", (wide[:1].expand(4, 7, 60), ids), options)
    yield Sample("expanded_vocabulary", (wide[..., :1].expand(4, 7, 60), ids), options)
    yield Sample(
        "four_dimensions_strided", (wide.view(2, 2, 7, 60)[:, :, 1:], ids.view(2, 2, 7)[..., 1:])
    )
    yield Sample("no_rows", (wide[:0], ids[:0]), {"return_entropy": True})
    yield Sample("no_time", (wide[:, :0], ids[:, :0]), {"return_entropy": True})
    yield Sample("no_ids", (wide, torch.zeros(4, 7, 0, dtype=torch.long)), {"return_entropy": True})
    yield Sample("frozen", (wide.detach(), ids), {"return_entropy": True})


def of_length(length: int) -> Sample:
    x = _logits(2, length, 33, dtype=torch.float32).requires_grad_()
    return Sample("", (x, _ids(2, length, vocab=33)), {"return_entropy": True})


def rejected() -> Iterator[Rejected]:
    x, ids = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)
    yield Rejected("not_a_tensor", ([1.0], ids), {}, TypeError, "logits: expected a tensor")
    yield Rejected("integer_logits", (ids, ids), {}, TypeError, "logits: expected dtype float32")
    yield Rejected("float_ids", (x, x[..., 0]), {}, TypeError, "token_ids: expected dtype int64")
    yield Rejected("no_vocabulary", (x[..., :0], ids), {}, ValueError, r"logits: .*V >= 1")
    yield Rejected("id_shape", (x, ids[:, :2]), {}, ValueError, r"token_ids: .*\(2, 3\).*\(2, 2\)")
    yield Rejected("id_rank", (x, ids[0]), {}, ValueError, "token_ids: expected shape")
    yield Rejected("id_too_large", (x, ids + 8), {}, ValueError, r"token_ids: .*\[0, 8\).*8 in row")
    yield Rejected("id_negative", (x, ids - 100), {}, ValueError, "token_ids: .*-100 in row")
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        yield Rejected(
            f"temperature_{bad}",
            (x, ids),
            {"temperature": bad},
            ValueError,
            "temperature: .*above 0",
        )
    yield Rejected("temperature_type", (x, ids), {"temperature": "1"}, TypeError, "temperature: ")
    yield Rejected(
        "temperature_shape",
        (x, ids),
        {"temperature": torch.ones(3)},
        ValueError,
        r"temperature: .*\(2, 3\)",
    )
    yield Rejected(
        "temperature_grad",
        (x, ids),
        {"temperature": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        "temperature: .*does not require grad",
    )
    yield Rejected(
        "mask_shape", (x, ids), {"mask": torch.ones(3, 2)}, ValueError, "mask: expected shape"
    )
    yield Rejected("mask_type", (x, ids), {"mask": [1]}, TypeError, "mask: expected a tensor")
    yield Rejected("softcap", (x, ids), {"softcap": 0.0}, ValueError, "softcap: .*above 0, got 0.0")
    yield Rejected("backend", (x, ids), {"backend": "fastest"}, ValueError, "backend: .*'fastest'")


def eager(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _trl() -> dict[str, Callable]:
    from trl.trainer.utils import selective_log_softmax

    return {"TRL": selective_log_softmax}


def _benchmark(rows: int, vocab: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = _logits(rows, vocab, dtype=dtype).requires_grad_()
        return Sample("", (x, _ids(rows, vocab=vocab)))

    return Benchmark(
        name=f"{rows} x {vocab}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # forward reads the logits; backward reads them and writes the gradient
        bytes_moved=lambda s: s.args[0].numel() * s.args[0].element_size(),
        backward_bytes_moved=lambda s: 2 * s.args[0].numel() * s.args[0].element_size(),
        peers=(_trl,),
        floor={"logits.sum()": lambda logits, token_ids: logits.sum(-1)},
        devices=devices,
    )


OP = Op(
    name="token_logprobs",
    function=token_logprobs,
    reference=reference.token_logprobs,
    kernels=("token_logprobs_fwd", "token_logprobs_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Milakov & Gimelshein 2018",
    summary="log-softmax gathered at token ids, and the entropy",
    benchmarks=(
        _benchmark(1024, 32000),
        _benchmark(512, 151936),
        _benchmark(8192, 128256, devices=("cuda",)),
        _benchmark(8192, 151936, devices=("cuda",)),
    ),
)
