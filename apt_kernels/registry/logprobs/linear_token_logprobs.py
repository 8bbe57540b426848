"""linear_token_logprobs: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import reference
from ...ops.logprobs.linear_token_logprobs import linear_token_logprobs
from ..common.heads import hidden_and_weight, ids, normal
from ..entry import Benchmark, Op, Rejected, Sample


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def head(*rows: int, features: int = 24, vocab: int = 37, **kwargs):
        return hidden_and_weight(*rows, features=features, vocab=vocab, dtype=dtype, **kwargs)

    def floats(*shape: int, **kwargs) -> torch.Tensor:
        return normal(*shape, dtype=dtype, **kwargs)

    h, w = head(3, 5)
    tokens = ids(3, 5, vocab=37)
    bias = floats(37, seed=5).requires_grad_()
    entropy = {"return_entropy": True}
    rows = torch.linspace(0.3, 2.0, 15).view(3, 5)
    yield Sample("plain", (h, w, tokens))
    yield Sample("entropy", (h, w, tokens), {"bias": bias, **entropy})
    yield Sample("frozen_head", (h, w.detach(), tokens), {"bias": bias.detach()})
    everything = {"temperature": rows, "softcap": 4.0, "logit_scale": 0.7, "bias": bias}
    yield Sample("everything", (h, w, tokens), {**everything, **entropy})
    yield Sample("temperature", (h, w, tokens), {"temperature": 0.7, **entropy})
    yield Sample("temperature_per_row", (h, w, tokens), {"temperature": rows})
    yield Sample("softcap", (h, w, tokens), {"softcap": 5.0, "temperature": 1.3})
    yield Sample("logit_scale", (h, w, tokens), {"logit_scale": 0.0625, "bias": bias})
    frozen = {**everything, "bias": bias.detach()}
    yield Sample("frozen_head_everything", (h, w.detach(), tokens), frozen)
    yield Sample("frozen_head_entropy", (h, w.detach(), tokens), {**frozen, **entropy})
    yield Sample("frozen_weight", (h, w.detach(), tokens), {"bias": bias})
    yield Sample("frozen_hidden", (h.detach(), w, tokens), {"bias": bias, **entropy})
    yield Sample("bias_only", (h.detach(), w.detach(), tokens), {"bias": bias})
    yield Sample("frozen", (h.detach(), w.detach(), tokens), entropy)
    yield Sample("int32_ids", (h, w, tokens.int()))
    h, w = head()
    yield Sample("one_row", (h, w, ids(vocab=37)), {"temperature": 1.5})
    h, w = head(2, 2, 3)
    yield Sample("four_dimensions", (h, w, ids(2, 2, 3, vocab=37)), entropy)

    for vocab in (1, 2, 15, 17, 511, 1025, 2053, 50257):
        h, w = head(3, vocab=vocab, features=8 if vocab > 10_000 else 33, seed=vocab)
        last = torch.tensor([vocab - 1, 0, vocab // 2])
        yield Sample(f"vocabulary_of_{vocab}", (h, w, last), {"softcap": 9.0, **entropy})
        yield Sample(f"vocabulary_of_{vocab}_frozen_head", (h, w.detach(), last))
    h, w = head(300, features=5, vocab=1100)  # several blocks of rows and tiles of columns
    yield Sample("several_tiles", (h, w, ids(300, vocab=1100)), entropy)
    yield Sample("several_tiles_frozen_head", (h, w.detach(), ids(300, vocab=1100)))
    h, w = head(6, features=1)
    yield Sample("one_feature", (h, w, ids(6, vocab=37)))
    h, w = head(4, scale=300.0)
    yield Sample("large_logits", (h, w, ids(4, vocab=37)))
    yield Sample("large_logits_frozen_head", (h, w.detach(), ids(4, vocab=37)))
    rising = torch.linspace(-60, 60, 4000).view(-1, 1).to(dtype)  # the maximum moves in every tile
    one = torch.ones(2, 1, dtype=dtype)
    yield Sample("rising_maximum", (one.clone().requires_grad_(), rising, ids(2, vocab=4000)))

    excluded = floats(1500, seed=5)
    excluded[:700] = -torch.inf  # the first tiles hold nothing but excluded columns
    excluded[1490:] = -torch.inf
    h, w = head(3, vocab=1500)
    tokens = torch.tensor([700, 1489, 900])
    yield Sample("excluded_columns", (h, w, tokens), {"bias": excluded, "softcap": 8.0, **entropy})
    yield Sample("excluded_columns_frozen_head", (h, w.detach(), tokens), {"bias": excluded})

    h, w = head(3, 5)
    tokens = ids(3, 5, vocab=37)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    dirty = h.detach().clone()
    dirty[0, 1], dirty[1, 2] = torch.nan, torch.inf
    dirty = dirty.requires_grad_()
    dirty_ids = tokens.masked_fill(mask == 0, -100)
    dirty_rows = rows.masked_fill(mask == 0, torch.nan)
    for name, m in (("mask", mask.bool()), ("mask_int", mask), ("mask_float", mask.float())):
        yield Sample(name, (dirty, w, dirty_ids), {"mask": m, "bias": bias, **entropy})
    options = {"mask": mask, "temperature": dirty_rows}
    yield Sample("mask_frozen_head", (dirty, w.detach(), dirty_ids), options)
    yield Sample("mask_temperatures", (dirty, w, dirty_ids), {**options, **entropy})
    nothing = {"mask": torch.zeros(3, 5), "bias": bias}
    yield Sample("all_masked", (dirty, w, dirty_ids), {**nothing, **entropy})
    yield Sample("all_masked_frozen_head", (dirty, w.detach(), dirty_ids), {"mask": mask * 0})
    yield Sample("expanded_mask", (h, w, tokens), {"mask": mask[:1].expand(3, 5)})

    wide = floats(4, 7, 48).requires_grad_()
    tokens = ids(4, 7, vocab=37)
    yield Sample("sliced_time", (wide[:, :-1, :24], w, tokens[:, 1:]), entropy)
    yield Sample("transposed_rows", (wide.transpose(0, 1)[..., ::2], w, tokens.t()))
    yield Sample(
        "transposed_features", (wide[..., :24].transpose(1, 2), w[:, :7], ids(4, 24, vocab=37))
    )
    expanded = wide[:1, ..., :24].expand(4, 7, 24)
    yield Sample("expanded", (expanded, w[:, :1].expand(37, 24), tokens), entropy)
    mixed = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    yield Sample("mixed_dtypes", (h, w.detach().to(mixed).requires_grad_(), ids(3, 5, vocab=37)))
    yield Sample("no_rows", (h[:0], w, ids(0, 5, vocab=37)), {"bias": bias, **entropy})
    yield Sample("no_rows_frozen_head", (h[:0], w.detach(), ids(0, 5, vocab=37)))


def of_length(length: int) -> Sample:
    head = hidden_and_weight(2, length, features=8, vocab=33, dtype=torch.float32)
    return Sample("", (*head, ids(2, length, vocab=33)), {"return_entropy": True})


def rejected() -> Iterator[Rejected]:
    h, w, tokens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.zeros(2, 3, dtype=torch.long)

    def wrong(name: str, message: str, error: type[Exception] = ValueError, **kwargs) -> Rejected:
        arguments = {"hidden": h, "weight": w, "token_ids": tokens, **kwargs}
        args = tuple(arguments.pop(k) for k in ("hidden", "weight", "token_ids"))
        return Rejected(name, args, arguments, error, message)

    yield wrong("not_a_tensor", "hidden: expected a tensor", TypeError, hidden=[1.0])
    yield wrong("integer_weight", "weight: expected dtype float32", TypeError, weight=w.long())
    yield wrong("float_ids", "token_ids: expected dtype int64", TypeError, token_ids=tokens + 0.5)
    yield wrong("no_features", r"hidden: .*D >= 1", hidden=h[..., :0], weight=w[:, :0])
    yield wrong("weight_shape", r"weight: .*\(V, 8\).*\(5, 7\)", weight=w[:, :7])
    yield wrong("weight_rank", "weight: expected 2 dimensions", weight=w[0])
    yield wrong("no_vocabulary", "weight: .*V >= 1", weight=w[:0])
    yield wrong("bias_shape", r"bias: .*\(5,\).*\(4,\)", bias=torch.randn(4))
    yield wrong("id_shape", r"token_ids: .*\(2, 3\).*\(2, 2\)", token_ids=tokens[:, :2])
    yield wrong("several_ids", "token_ids: expected shape", token_ids=tokens.unsqueeze(-1))
    yield wrong("id_too_large", r"token_ids: .*\[0, 5\).*5 in row 0", token_ids=tokens + 5)
    yield wrong("id_negative", "token_ids: .*-100 in row", token_ids=tokens - 100)
    yield wrong("temperature", "temperature: .*above 0", temperature=0.0)
    yield wrong("temperature_shape", r"temperature: .*\(2, 3\)", temperature=torch.ones(3))
    needs_grad = torch.ones(2, 3, requires_grad=True)
    yield wrong("temperature_grad", "temperature: .*not require grad", temperature=needs_grad)
    yield wrong("softcap", "softcap: .*above 0", softcap=-1.0)
    yield wrong("logit_scale", "logit_scale: .*above 0", logit_scale=0.0)
    yield wrong("mask_shape", "mask: expected shape", mask=torch.ones(3, 2))
    yield wrong("backend", "backend: .*'fastest'", backend="fastest")


def eager(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, *, mask=None
) -> torch.Tensor:
    logps = F.linear(hidden, weight).log_softmax(-1)
    logps = logps.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return logps if mask is None else logps * mask


def _benchmark(
    rows: int,
    features: int,
    vocab: int,
    frozen_head: bool = False,
    masked: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        hidden, weight = hidden_and_weight(rows, features=features, vocab=vocab, dtype=dtype)
        tokens = ids(rows, vocab=vocab)
        mask = {"mask": torch.arange(rows) % 2 == 0} if masked else {}
        return Sample("", (hidden, weight.detach() if frozen_head else weight, tokens), mask)

    def product(s: Sample, masked: bool) -> int:
        return 2 * rows * features * vocab // (1 + masked)

    suffix = ", frozen head" * frozen_head + ", half masked" * masked
    return Benchmark(
        name=f"{rows} x {features} x {vocab}{suffix}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # the weight is read, in the backward pass too, and its gradient is written
        bytes_moved=lambda s: s.args[1].numel() * s.args[1].element_size(),
        backward_bytes_moved=lambda s: (
            (1 + s.args[1].requires_grad) * s.args[1].numel() * s.args[1].element_size()
        ),
        # one product forward; backward the same again and one for each gradient
        flops=lambda s: product(s, masked),
        backward_flops=lambda s: (2 + s.args[1].requires_grad) * product(s, masked),
        devices=devices,
    )


OP = Op(
    name="linear_token_logprobs",
    function=linear_token_logprobs,
    reference=reference.linear_token_logprobs,
    kernels=("linear_token_logprobs_fwd", "linear_token_logprobs_bwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("hidden", "weight", "bias"),
    source="Wijmans 2024",
    summary="token log-probabilities from hidden states, without the logits",
    benchmarks=(
        _benchmark(1024, 576, 49152),
        _benchmark(1024, 576, 49152, masked=True),
        _benchmark(1024, 576, 49152, frozen_head=True),
        _benchmark(8192, 4096, 131072, devices=("cuda",)),
        _benchmark(8192, 4096, 151936, devices=("cuda",)),
        _benchmark(8192, 4096, 151936, frozen_head=True, devices=("cuda",)),
        _benchmark(8192, 4096, 151936, masked=True, devices=("cuda",)),
    ),
)
