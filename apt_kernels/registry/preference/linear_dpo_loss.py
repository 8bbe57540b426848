"""linear_dpo_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops.preference.linear_dpo_loss import linear_dpo_loss
from ..common.heads import hidden_and_weight, ids, normal
from ..entry import Benchmark, Op, Rejected, Sample
from . import dpo_loss


def _pairs(
    pairs: int,
    length: int,
    dtype: torch.dtype,
    *,
    features: int = 24,
    vocab: int = 37,
    reference_logps: bool = True,
) -> tuple[Tensor, ...]:
    shape = (2 * pairs, length)
    hidden, weight = hidden_and_weight(
        *shape, features=features, vocab=vocab, dtype=dtype, scale=1.0
    )
    token_ids = ids(*shape, vocab=vocab)
    mask = normal(*shape, dtype=torch.float32, seed=4) > -0.5
    args = (hidden, weight, token_ids, mask)
    if not reference_logps:
        return args
    logps = reference.linear_token_logprobs(
        hidden.detach().float(), weight.detach().float(), token_ids, mask=mask
    ).sum(-1)
    refs = logps + normal(2 * pairs, dtype=torch.float32, scale=3.0, seed=5)
    return *args, refs[:pairs].to(dtype), refs[pairs:].to(dtype)


def _types(dtype: torch.dtype) -> Iterator[Sample]:
    for loss_type, options in dpo_loss.TYPES.items():
        without = loss_type in dpo_loss.WITHOUT_REFERENCE
        kwargs = {"loss_type": loss_type, "average": without, **options}
        if loss_type in dpo_loss.NORMALISED:
            kwargs |= {f"{n}_lengths": torch.tensor([3, 1, 5, 4]) for n in ("chosen", "rejected")}
        x = _pairs(4, 7, dtype, reference_logps=not without)
        for reduction in ("mean", "none"):
            yield Sample(f"{loss_type}_{reduction}", x, {"reduction": reduction, **kwargs})
        yield Sample(f"{loss_type}_frozen_head", (x[0], x[1].detach(), *x[2:]), kwargs)
        if not without:
            yield Sample(f"{loss_type}_reference_free", x, {"reference_free": True, **kwargs})


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    x = _pairs(3, 6, dtype)
    hidden, weight, token_ids, mask, *refs = x
    bias = normal(37, dtype=dtype, seed=7).requires_grad_()
    heat = torch.linspace(0.4, 2.0, 36).view(6, 6)
    yield Sample("plain", x)
    yield Sample("sum", x, {"reduction": "sum", "beta": 0.5})
    yield Sample("frozen_head", (hidden, weight.detach(), token_ids, mask, *refs))
    head = {"bias": bias, "softcap": 5.0, "logit_scale": 0.7, "temperature": heat}
    yield Sample("everything", x, {**head, "average": True, "label_smoothing": 0.1})
    yield from _types(dtype)
    yield Sample("frozen_hidden", (hidden.detach(), *x[1:]), {"bias": bias})
    yield Sample("frozen", (hidden.detach(), weight.detach(), *x[2:]))
    yield Sample("no_reference", x[:4], {"reference_free": True})
    yield Sample("int_mask", (hidden, weight, token_ids, mask.long(), *refs))
    yield Sample("int32_ids", (hidden, weight, token_ids.int(), mask, *refs))
    some = mask.clone()
    some[1] = False
    for name, counts in (("dirty", some), ("all_masked", torch.zeros_like(mask))):
        spoiled = hidden.detach().masked_fill(~counts.unsqueeze(-1), torch.nan).requires_grad_()
        for kind, w in (("", weight), ("_frozen_head", weight.detach())):
            args = (spoiled, w, token_ids.masked_fill(~counts, -100), counts, *refs)
            yield Sample(f"{name}{kind}", args, {"temperature": heat.masked_fill(~counts, 0.0)})
    wide = normal(6, 9, 48, dtype=dtype).requires_grad_()
    yield Sample("sliced", (wide[:, 2:-1, ::2], weight, token_ids, mask, *refs))
    yield Sample("transposed", (wide[:, :6].transpose(0, 1)[..., :24], weight, *x[2:]))
    other = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    yield Sample("mixed_dtypes", (hidden, weight.detach().to(other).requires_grad_(), *x[2:]))
    for pairs, length in ((0, 5), (2, 0), (0, 0), (1, 1)):
        yield Sample(f"{pairs}_pairs_of_{length}", _pairs(pairs, length, dtype))
    yield Sample("several_tiles", _pairs(4, 90, dtype, features=5, vocab=1100))


def of_length(length: int) -> Sample:
    return Sample("", _pairs(2, length, torch.float32, features=8, vocab=33))


def rejected() -> Iterator[Rejected]:
    names = ("hidden", "weight", "token_ids", "mask", "ref_chosen_logps", "ref_rejected_logps")
    given = dict(zip(names, _pairs(2, 3, torch.float32, features=8, vocab=5), strict=True))
    given["mask"] = torch.ones(4, 3, dtype=torch.bool)

    def wrong(name: str, message: str, error: type[Exception] = ValueError, **kwargs) -> Rejected:
        arguments = {**given, **kwargs}
        args = tuple(arguments.pop(n) for n in names)
        return Rejected(name, args, arguments, error, message)

    h, w, token_ids, mask, ref, _ = given.values()
    yield wrong("not_a_tensor", "hidden: expected a tensor", TypeError, hidden=[1.0])
    yield wrong("two_dims", "hidden: expected 3 dim", hidden=h[0])
    yield wrong("odd", r"hidden: expected an even number of rows.*\(3, 3, 8\)", hidden=h[:3])
    yield wrong("weight_shape", r"weight: .*\(V, 8\).*\(5, 7\)", weight=w[:, :7])
    yield wrong("bias_shape", r"bias: .*\(5,\).*\(4,\)", bias=torch.randn(4))
    yield wrong("float_ids", "token_ids: expected dtype int64", TypeError, token_ids=ref)
    yield wrong("id_shape", r"token_ids: .*\(4, 3\).*\(4, 2\)", token_ids=token_ids[:, :2])
    yield wrong("id_too_large", r"token_ids: .*\[0, 5\)", token_ids=token_ids + 5)
    yield wrong("mask_shape", r"mask: .*\(4, 3\).*\(4,\)", mask=mask[:, 0])
    yield wrong("mask_none", "mask: expected a tensor", TypeError, mask=None)
    yield wrong("temperature", "temperature: .*above 0", temperature=-1.0)
    yield wrong("softcap", "softcap: .*above 0", softcap=0.0)
    yield wrong("logit_scale", "logit_scale: .*above 0", logit_scale=0.0)
    yield wrong("average", "average: expected True or False", TypeError, average=1)
    yield wrong("ref_shape", r"ref_chosen_logps: .*\(2,\).*\(1,\)", ref_chosen_logps=ref[:1])
    grad = ref.clone().requires_grad_()
    yield wrong("ref_grad", "ref_chosen_logps: .*not require grad", ref_chosen_logps=grad)
    yield wrong("one_ref", "ref_rejected_logps: ", TypeError, ref_rejected_logps=None)
    yield wrong("simpo_ref", "ref_chosen_logps: .*simpo has no reference", loss_type="simpo")
    yield wrong("loss_type", "loss_type: .*'sigmoid'.*'dpo'", loss_type="dpo")
    yield wrong("beta", "beta: .*above 0", beta=0.0)
    yield wrong("reduction", "reduction: .*'average'", reduction="average")
    yield wrong("lengths", "chosen_lengths: .*sigmoid is not normalised", chosen_lengths=ref)
    yield wrong("tau", "discopop_tau: .*sigmoid has none", discopop_tau=0.1)
    yield wrong("backend", "backend: .*'fastest'", backend="fastest")


def eager(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor, chosen: Tensor, other: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logps = F.linear(hidden, weight).log_softmax(-1)
    logps = (logps.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)
    return dpo_loss.eager(*logps.chunk(2), chosen, other)


def _benchmark(pairs: int, length: int, features: int, vocab: int, frozen: bool) -> Benchmark:
    def make(dtype: torch.dtype) -> Sample:
        x = list(_pairs(pairs, length, dtype, features=features, vocab=vocab))
        if frozen:
            x[1] = x[1].detach()
        return Sample("", tuple(x))

    return Benchmark(
        name=f"{pairs} x 2 x {length} x {features} x {vocab}{', frozen head' * frozen}",
        make=make,
        eager=eager,
        dtypes=(torch.float32, torch.bfloat16),
        # as linear_token_logprobs: the weight, read again backward, and its gradient
        bytes_moved=lambda s: s.args[1].numel() * s.args[1].element_size(),
        backward_bytes_moved=lambda s: (
            (1 + s.args[1].requires_grad) * s.args[1].numel() * s.args[1].element_size()
        ),
        flops=lambda s: 4 * pairs * length * features * vocab,
        backward_flops=lambda s: (8 if frozen else 12) * pairs * length * features * vocab,
    )


OP = Op(
    name="linear_dpo_loss",
    function=linear_dpo_loss,
    reference=reference.linear_dpo_loss,
    kernels=("linear_token_logprobs_fwd", "sequence_logps_fwd", "dpo_loss_fwd"),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    autocast=("hidden", "weight", "bias"),
    source="Rafailov 2023; Wijmans 2024",
    summary="dpo_loss from hidden states, without the logits",
    benchmarks=(
        _benchmark(4, 128, 576, 49152, frozen=False),
        _benchmark(4, 128, 576, 49152, frozen=True),
    ),
)
