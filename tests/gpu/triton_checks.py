"""Calls of the launchers and what they must give: the reference in the same dtype and in float64.

`kernels` is any namespace of launchers, so that tests can also pass one with a bug in it.
"""

import math
import mmap
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from apt_kernels import dispatch, reference
from apt_kernels.calls import assert_results, call, fresh
from apt_kernels.registry import OPS, Sample
from apt_kernels.testing import ULPS, assert_as_accurate

DPO_TYPES = {
    "sigmoid": 0, "robust": 1, "hinge": 2, "ipo": 3, "exo_pair": 4, "nca_pair": 5, "bco_pair": 6,
    "sppo_hard": 7, "apo_zero": 8, "apo_down": 9, "discopop": 10, "simpo": 11, "orpo": 12,
}  # fmt: skip
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@dataclass
class Case:
    name: str
    inputs: dict
    options: dict = field(default_factory=dict)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of untouched memory: pages come into being, as zeros, when they are written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _compare(actual, plain, exact, names, ulps=ULPS):
    for got, reference_, wanted, name in zip(actual, plain, exact, names, strict=True):
        assert_as_accurate(got, reference_, wanted, name=name, ulps=ulps)


def _leaf(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if t is None:
        return None
    return (t.detach().clone() if dtype is None else t.detach().to(dtype)).requires_grad_()


def registry_sample(kernels, operation: str, name: str, dtype=torch.float32, ulps=ULPS) -> None:
    """A call of the public function, with these launchers behind it."""
    given = next(sample for sample in OPS[operation].samples(dtype) if sample.name == name)
    public_call(kernels, operation, given, ulps)


def public_call(kernels, operation: str, given, ulps=ULPS) -> None:
    """The same of any call."""
    op = OPS[operation]
    launchers = {(kernel, "triton"): getattr(kernels, kernel) for kernel in op.kernels}
    with mock.patch.dict(dispatch._KERNELS, launchers):
        actual = call(op.function, fresh(given), backend="triton")
    assert_results(op, given, actual, ulps=ulps)


def large_groups(kernels, dtype) -> None:
    """Groups that no program keeps whole, and the largest that one does."""
    for groups, size in ((2, 1500), (3, 1024), (3, 65), (5, 64)):
        rewards = torch.randn(groups * size, generator=_generator(f"{groups}{size}")).to(dtype)
        for kind in ("relative", "normalized", "rank", "leave_one_out"):
            given = Sample(f"{kind} of {size}", (rewards, size, kind))
            public_call(kernels, "group_advantages", given)


def many_rows(kernels, dtype) -> None:
    """So many that a launch of its own adds their lengths, some of several tiles, some empty."""
    for B, T, empty in ((40, 33, 0), (17, 1100, 0), (140, 3, 66)):
        generator = _generator(f"{B}{T}")
        logps, old, ref, values = torch.randn(4, B, T, generator=generator).to(dtype)
        returns = (torch.randn(B, T, generator=generator) + 100).to(dtype)
        mask = torch.rand(B, T, generator=generator) < 0.4
        mask[::3] = False
        mask[:empty] = False
        for aggregation in ("token_mean", "sequence_mean", "dr_grpo"):
            options = {"aggregation": aggregation, "clip_range": 0.2}
            leaves = values.clone().requires_grad_(), returns, mask
            given = Sample(f"{B} x {T} {aggregation}", leaves, {"old_values": ref, **options})
            public_call(kernels, "value_loss", given)
            leaves = logps.clone().requires_grad_(), old, values, mask
            options = {"aggregation": aggregation}
            public_call(kernels, "policy_loss", Sample(given.name, leaves, options))


def token_logprobs_cases(dtype: torch.dtype):
    def case(name, shape, K=1, scale=3.0, change=None, ids=None, **options):
        generator = _generator(name)
        logits = (torch.randn(*shape, generator=generator) * scale).to(dtype)
        logits = logits if change is None else change(logits)
        A, B, V = logits.shape
        if ids is None:
            ids = torch.randint(0, V, (A, B, K), generator=generator)
        return Case(name, {"logits": logits, "token_ids": ids}, options)

    for V in (1, 2, 15, 16, 17, 37, 1023, 1024, 1025, 2053, 4097, 32003, 50257):
        ids = torch.full((1, 3, 1), V - 1)
        yield case(f"last_column_of_{V}", (1, 3, V), ids=ids)
    yield case("no_entropy", (2, 3, 77), entropy=False)
    yield case("several_ids", (2, 3, 70), K=4)
    yield case("many_ids", (2, 2, 1500), K=37)
    yield case("repeated_ids", (1, 2, 40), ids=torch.full((1, 2, 5), 7))
    yield case("no_ids", (2, 2, 40), K=0)
    yield case("temperature", (2, 3, 1030), temperature=0.7)
    yield case("temperatures", (2, 3, 45), temperatures=torch.rand(2, 3) * 2 + 0.3)
    yield case("softcap", (2, 3, 2053), softcap=5.0, temperature=1.3)
    yield case("softcap_of_large_logits", (2, 3, 200), scale=100, softcap=30.0)
    yield case("large_logits", (2, 2, 1000), scale=300, temperature=0.7)
    yield case("sliced_columns", (2, 3, 300), change=lambda x: x[:, :, 3:-2])
    yield case("sliced_rows", (4, 5, 77), change=lambda x: x[:, :-1])
    yield case("transposed", (5, 4, 33), change=lambda x: x.transpose(0, 1))
    yield case("expanded", (1, 1, 53), change=lambda x: x.expand(3, 4, 53))
    yield case("one_row_for_all_columns", (3, 1, 53), change=lambda x: x.expand(3, 4, 53))

    mask = torch.tensor([[True, False, True], [False, False, True]])

    def poison(x):
        x[~mask] = torch.nan
        return x

    ids = torch.where(mask.unsqueeze(-1), 5, torch.tensor([-100]))
    ids[0, 1] = 10**12
    yield case("masked_rows_of_nan", (2, 3, 1300), change=poison, ids=ids, mask=mask)
    yield case("all_masked", (2, 3, 21), mask=torch.zeros(2, 3, dtype=torch.bool))

    def exclude(x):
        x[..., 33:] = -torch.inf
        x[0, 1, :30] = -torch.inf
        return x

    ids = torch.tensor([[0, 31, 39], [2, 35, 32]]).unsqueeze(-1)
    yield case("excluded_columns", (2, 3, 40), change=exclude, ids=ids, temperature=1.5)
    yield case("excluded_and_capped", (2, 3, 40), change=exclude, ids=ids, softcap=4.0)
    yield case("rows_of_nothing", (2, 3, 40), change=lambda x: x * -torch.inf * x.sign())


def token_logprobs(kernels, case: Case) -> None:
    logits, ids = case.inputs["logits"], case.inputs["token_ids"]
    mask, temperatures = case.options.get("mask"), case.options.get("temperatures")
    temperature, softcap = case.options.get("temperature", 1.0), case.options.get("softcap")
    with_entropy = case.options.get("entropy", True)
    generator = _generator(case.name)
    grad = torch.randn(ids.shape, generator=generator)
    grad_entropy = torch.randn(ids.shape[:2], generator=generator) if with_entropy else None
    shared = (mask, temperatures)
    logps, entropy, lse = kernels.token_logprobs_fwd(
        logits, ids, *shared, temperature, softcap or 0.0, with_entropy
    )
    grad_logits = kernels.token_logprobs_bwd(
        grad, grad_entropy, logits, ids, *shared, lse, entropy, temperature, softcap or 0.0
    )
    assert grad_logits.is_contiguous()
    if not with_entropy:
        assert entropy.shape == (0,)
    if mask is not None:
        assert not grad_logits[~mask].any() and not logps[~mask].any()

    def expected(dtype):
        x = _leaf(logits, dtype)
        t = temperature if temperatures is None else temperatures.to(dtype or torch.float32)
        outputs = reference.token_logprobs(
            x, ids, temperature=t, mask=mask, softcap=softcap, return_entropy=with_entropy
        )
        outputs = outputs if with_entropy else (outputs,)
        ends = [grad, grad_entropy][: len(outputs)]
        x_grad = torch.autograd.grad(outputs, x, [e.to(o.dtype) for e, o in zip(ends, outputs)])
        return [*(o.detach() for o in outputs), *x_grad]

    actual = [logps, entropy, grad_logits] if with_entropy else [logps, grad_logits]
    names = ["logps", "entropy", "grad"] if with_entropy else ["logps", "grad"]
    _compare(actual, expected(None), expected(torch.float64), names)


def sequence_logps_cases(dtype: torch.dtype):
    def case(name, B, T, change=None, kept=0.6):
        generator = _generator(name)
        logps = torch.randn(B, T, generator=generator).to(dtype)
        logps = logps if change is None else change(logps)
        mask = torch.rand(logps.shape, generator=generator) < kept
        logps[~mask] = torch.nan
        return Case(name, {"logps": logps, "mask": mask})

    for T in (0, 1, 7, 8, 9, 1023, 1025, 3001):
        yield case(f"length_{T}", 3, T)
    yield case("sliced", 4, 60, change=lambda x: x[:, 3:])
    yield case("every_other", 4, 60, change=lambda x: x[:, ::2])
    yield case("transposed", 40, 5, change=lambda x: x.mT)
    yield case("all_masked", 3, 33, kept=0.0)
    yield case("none_masked", 3, 2000, kept=1.1)


def sequence_logps(kernels, case: Case) -> None:
    logps, mask = case.inputs["logps"], case.inputs["mask"]
    for average in (False, True):
        grad = torch.randn(len(logps), generator=_generator(case.name))
        sums, tokens = kernels.sequence_logps_fwd(logps, mask, average)
        actual = [sums, kernels.sequence_logps_bwd(grad / tokens if average else grad, mask)]

        def expected(dtype, average=average, grad=grad):
            x = _leaf(logps, dtype or torch.float32)  # the kernel's gradient is float32
            out = reference.sequence_logps(x, mask, average=average)
            return out.detach(), *torch.autograd.grad(out, x, grad.to(out.dtype))

        _compare(actual, expected(None), expected(torch.float64), ["logps", "grad"])


def dpo_loss(kernels, loss_type, dtype, reduction, B, spread=3.0) -> None:
    generator = _generator(f"{loss_type}{B}")
    logps = [(torch.randn(B, generator=generator) * spread).to(dtype) for _ in range(4)]
    options = {"beta": 0.3, "label_smoothing": 0.0}
    if loss_type in ("sigmoid", "robust", "exo_pair", "simpo"):
        options["label_smoothing"] = 0.1
    if loss_type == "discopop":
        options["discopop_tau"] = 0.7
    if loss_type == "simpo":
        options["simpo_gamma"] = 0.4
    if loss_type in ("simpo", "orpo"):
        logps[2:] = None, None
    if loss_type == "orpo":
        logps[:2] = [-t.abs() - 0.01 for t in logps[:2]]
    actual = kernels.dpo_loss_fwd(
        *logps, DPO_TYPES[loss_type], REDUCTIONS[reduction], options["beta"],
        options["label_smoothing"], options.get("discopop_tau", 0.05),
        options.get("simpo_gamma", 0.5),
    )  # fmt: skip

    def expected(dtype):
        policy = [_leaf(t, dtype or torch.float32) for t in logps[:2]]
        outputs = reference.dpo_loss(
            *policy, *[None if t is None else t.to(policy[0].dtype) for t in logps[2:]],
            loss_type=loss_type, reduction=reduction, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(outputs[0].sum(), policy)
        return [*(o.detach() for o in outputs), torch.stack(grads)]

    names = ["loss", "chosen_rewards", "rejected_rewards", "grads"]
    _compare(actual, expected(None), expected(torch.float64), names)


FINE_SMOOTHING = {"robust": (0.4999, 300), "exo_pair": (0.499, 3)}  # and the spread of the pairs


def fine_smoothing(kernels, loss_type) -> None:
    """Constants of a smoothing near 1/2, such as 1 - 2s, that float32 would take digits from."""
    smoothing, spread = FINE_SMOOTHING[loss_type]
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(64, generator=generator) * spread).requires_grad_() for _ in range(2)]
    options = {"loss_type": loss_type, "label_smoothing": smoothing, "reduction": "none"}
    options["reference_free"] = True
    public_call(kernels, "dpo_loss", Sample(f"{loss_type} {smoothing}", tuple(pairs), options))


def bradley_terry_loss(kernels, dtype, reduction, B, margins=False, center_coef=0.0) -> None:
    generator = _generator(f"{reduction}{B}")
    rewards = [(torch.randn(B, generator=generator) * 4).to(dtype) for _ in range(2)]
    each = torch.randn(B, generator=generator) if margins else None
    actual = kernels.bradley_terry_loss_fwd(
        *rewards, each, 0.0 if margins else 0.3, center_coef, REDUCTIONS[reduction]
    )

    def expected(dtype):
        inputs = [_leaf(t, dtype or torch.float32) for t in rewards]
        margin = each.to(inputs[0].dtype) if margins else 0.3
        loss = reference.bradley_terry_loss(
            *inputs, margin=margin, center_coef=center_coef, reduction=reduction
        )
        return loss.detach(), torch.stack(torch.autograd.grad(loss.sum(), inputs))

    _compare(actual, expected(None), expected(torch.float64), ["loss", "grads"])


def _head_inputs(name, N, D, V, dtype, with_bias, kept):
    generator = _generator(name)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    hidden, weight = random(N, D), random(V, D) * 3 / D**0.5
    ids = torch.randint(0, V, (N,), generator=generator)
    best = (hidden @ weight.T).argmax(-1)
    ids[::3] = best[::3]  # some predictions are right
    mask = None if kept is None else torch.rand(N, generator=generator) < kept
    bias = random(V).to(dtype) if with_bias else None
    return hidden.to(dtype), weight.to(dtype), bias, ids, mask


def linear_token_logprobs_cases(dtype: torch.dtype):
    def case(name, N, D, V, bias=False, kept=None, **options):
        names = ("hidden", "weight", "bias", "token_ids", "mask")
        inputs = _head_inputs(name, N, D, V, dtype, bias, kept)
        return Case(name, dict(zip(names, inputs, strict=True)), options)

    yield case("small", 5, 16, 37)
    yield case("one_column", 3, 16, 1)
    yield case("odd_sizes", 20, 33, 1061, temperature=0.7)
    yield case("no_entropy", 140, 64, 300, entropy=False)
    yield case("all_masked", 20, 16, 50, kept=0.0, bias=True)
    yield case("one_row_of_many", 300, 16, 50, kept=0.004)
    everything = case("everything", 150, 40, 300, bias=True, kept=0.5, softcap=6.0, logit_scale=0.7)
    everything.options["temperatures"] = torch.rand(150) * 2 + 0.3
    yield everything
    excluded = case("excluded_columns", 20, 16, 90, bias=True, kept=0.8)
    excluded.inputs["bias"][7:40] = -torch.inf
    excluded.inputs["token_ids"].clamp_(40, 89)
    yield excluded


def linear_token_logprobs(kernels, case: Case) -> None:
    hidden, weight, bias, ids, mask = case.inputs.values()
    temperatures = case.options.get("temperatures")
    temperature = case.options.get("temperature", 1.0)
    softcap, logit_scale = case.options.get("softcap"), case.options.get("logit_scale", 1.0)
    with_entropy = case.options.get("entropy", True)
    if mask is not None:  # what masked rows hold must not matter
        hidden, ids = hidden.clone(), ids.clone()
        hidden[~mask], ids[~mask] = torch.nan, -100
    generator = _generator(case.name)
    grad = torch.randn(ids.shape, generator=generator)
    grad_entropy = torch.randn(ids.shape, generator=generator) if with_entropy else None
    inputs = (hidden, weight, bias, ids, mask, temperatures)
    scales = (temperature, softcap or 0.0, logit_scale)
    logps, entropy, lse, formed = kernels.linear_token_logprobs_fwd(
        *inputs, *scales, with_entropy, True
    )
    again = kernels.linear_token_logprobs_fwd(*inputs, *scales, with_entropy, False)
    assert again[3].shape == (0,)
    for kept, formed_too in zip(again[:3], (logps, entropy, lse), strict=True):
        torch.testing.assert_close(kept, formed_too, rtol=1e-5, atol=1e-5, equal_nan=True)
    grads = kernels.linear_token_logprobs_bwd(
        grad, grad_entropy, *inputs, lse, entropy, *scales, True, True, bias is not None
    )

    def expected(dtype):
        leaves = [_leaf(t, dtype) for t in (hidden, weight, bias) if t is not None]
        outputs = reference.linear_token_logprobs(
            *leaves[:2], ids, bias=leaves[2] if bias is not None else None, mask=mask,
            temperature=temperature if temperatures is None else temperatures.to(
                dtype or torch.float32
            ),
            softcap=softcap, logit_scale=logit_scale, return_entropy=with_entropy,
        )  # fmt: skip
        outputs = outputs if with_entropy else (outputs,)
        ends = [e.to(outputs[0].dtype) for e in (grad, grad_entropy) if e is not None]
        all_grads = torch.autograd.grad(outputs, leaves, ends, retain_graph=True)
        own = torch.autograd.grad(outputs[0].sum(), leaves[0])
        return [*(o.detach() for o in outputs), *own, *all_grads]

    actual = [logps, *([entropy] if with_entropy else []), formed, *grads[: 2 + (bias is not None)]]
    names = ["logps", *(["entropy"] if with_entropy else []), "formed grad_hidden"]
    names += ["grad_hidden", "grad_weight", "grad_bias"][: 2 + (bias is not None)]
    _compare(actual, expected(None), expected(torch.float64), names)


def linear_cross_entropy_cases(dtype: torch.dtype):
    def case(name, N, D, V, bias=False, kept=1.1, needs=(True, True), **options):
        names = ("hidden", "weight", "bias", "labels")
        *inputs, mask = _head_inputs(name, N, D, V, dtype, bias, kept)
        inputs[3][~mask] = options.get("ignore_index", -100)
        inputs[0][~mask] = torch.nan
        options["needs"] = (*needs, bias)
        return Case(name, dict(zip(names, inputs, strict=True)), options)

    yield case("small", 5, 16, 37)
    yield case("one_column", 3, 16, 1)
    yield case("everything", 150, 40, 300, bias=True, kept=0.4, softcap=6.0, logit_scale=0.7,
               label_smoothing=0.1)  # fmt: skip
    yield case("frozen_head", 150, 40, 300, kept=0.5, reduction="sum", needs=(True, False))
    yield case("frozen_body", 70, 40, 300, kept=0.5, needs=(False, True))
    yield case("bias_only", 150, 40, 300, bias=True, needs=(False, False))
    yield case("normalizer", 70, 40, 300, kept=0.5, normalizer=torch.tensor(123.0))
    yield case("another_ignore_index", 70, 16, 90, kept=0.5, ignore_index=3)
    yield case("nothing_counts", 40, 40, 300, kept=0.0, bias=True)
    yield case("smoothing", 30, 16, 2053, label_smoothing=0.2)
    equal = case("equal_logits", 20, 16, 300)  # the first of equals is the prediction
    equal.inputs["weight"].zero_()
    equal.inputs["labels"].copy_(torch.arange(20) % 3)
    yield equal


def linear_cross_entropy(kernels, case: Case) -> None:
    hidden, weight, bias, labels = case.inputs.values()
    options = dict(case.options)
    needs = options.pop("needs")
    reduction = options.get("reduction", "mean")
    actual = kernels.linear_cross_entropy_fwd(
        hidden, weight, bias, labels, options.get("normalizer"), options.get("ignore_index", -100),
        options.get("label_smoothing", 0.0), options.get("softcap") or 0.0,
        options.get("logit_scale", 1.0), REDUCTIONS[reduction], *needs,
    )  # fmt: skip
    inputs = (hidden, weight, bias)

    def expected(dtype):
        leaves = [_leaf(t, dtype) for t in inputs]
        loss, correct = reference.linear_cross_entropy(
            *leaves[:2], labels, bias=leaves[2], return_correct=True, **options
        )
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
        return [loss.detach(), correct, *torch.autograd.grad(loss, wanted)]

    for grad, need in zip(actual[2:], needs, strict=True):
        assert need or grad.shape == (0,)
    kept = [*actual[:2], *(g for g, need in zip(actual[2:], needs, strict=True) if need)]
    names = ["grad_hidden", "grad_weight", "grad_bias"]
    names = ["loss", "correct", *(n for n, need in zip(names, needs, strict=True) if need)]
    _compare(kept, expected(None), expected(torch.float64), names)
