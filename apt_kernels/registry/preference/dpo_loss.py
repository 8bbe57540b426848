"""dpo_loss: samples, rejected calls, benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import reference
from ...ops.preference.dpo_loss import dpo_loss
from ..entry import Benchmark, Op, Rejected, Sample, seeded

# Every loss type, with the options it is sampled with.
TYPES = {
    "sigmoid": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.4},
    "kto_pair": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "sigmoid_norm": {"label_smoothing": 0.1},
    "simpo": {"label_smoothing": 0.1, "simpo_gamma": 0.9},
    "orpo": {},
}
WITHOUT_REFERENCE = ("simpo", "orpo")
NORMALISED = ("sigmoid_norm",)


def _lengths(*shape: int) -> dict[str, torch.Tensor]:
    generator = seeded(5)
    chosen, rejected = torch.randint(0, 60, (2, *shape), generator=generator)
    return {"chosen_lengths": chosen, "rejected_lengths": rejected}


def _logps(
    *shape: int, dtype: torch.dtype, loss_type: str = "sigmoid", seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Policy's and reference's, chosen and rejected; per token for the types that want it."""
    generator = seeded(seed)
    if loss_type in WITHOUT_REFERENCE:
        logps = -3 * torch.rand((2, *shape), generator=generator).clamp(min=1e-4)
    else:
        logps = -60 + 15 * torch.randn((4, *shape), generator=generator)
    policy = tuple(x.to(dtype).requires_grad_() for x in logps[:2])
    return policy + tuple(x.to(dtype) for x in logps[2:])


def _samples_of_types(dtype: torch.dtype) -> Iterator[Sample]:
    for loss_type, options in TYPES.items():
        options = {"loss_type": loss_type, **options}

        def of(pairs: int, loss_type=loss_type, options=options, **more) -> tuple:
            lengths = _lengths(pairs) if loss_type in NORMALISED else {}
            logps = _logps(pairs, dtype=dtype, loss_type=loss_type, seed=pairs)
            return logps, {**options, **lengths, **more}

        for reduction in ("mean", "sum", "none"):
            yield Sample(f"{loss_type}_{reduction}", *of(7, reduction=reduction))
        yield Sample(f"{loss_type}_large_beta", *of(40, beta=1.7))
        yield Sample(f"{loss_type}_one_pair", *of(1))
        yield Sample(f"{loss_type}_no_pairs", *of(0))
        yield Sample(f"{loss_type}_no_pairs_none", *of(0, reduction="none"))
        yield Sample(f"{loss_type}_1000_pairs", *of(1000))
        if loss_type not in WITHOUT_REFERENCE:
            logps, more = of(33)
            free = {**more, "reference_free": True}
            yield Sample(f"{loss_type}_no_reference", logps[:2], free)
            yield Sample(f"{loss_type}_reference_free", logps, free)


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    """Log-ratios of +-500, nearly equal and equal pairs."""
    chosen = torch.tensor([-1.0, -501, -1, -501, -20, -20, -3, -0.5, -0.1]).to(dtype)
    rejected = torch.tensor([-501.0, -1, -1, -501, -20.5, -20, -300, -90, -8]).to(dtype)
    ref = torch.tensor([-2.0, -2, -2, -2, -20, -20, -3, -0.25, -0.5]).to(dtype)
    for loss_type, options in TYPES.items():
        logps = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
        if loss_type not in WITHOUT_REFERENCE:
            logps += [ref, ref]
        lengths = _lengths(9) if loss_type in NORMALISED else {}
        for beta in (0.1, 1.0):
            if loss_type == "discopop":  # e^-l is meant to explode for a large tau; 0.05 must not
                options = {"discopop_tau": 0.05}
            kwargs = {"loss_type": loss_type, "beta": beta, "reduction": "none"}
            yield Sample(
                f"{loss_type}_large_{beta}", tuple(logps), {**kwargs, **options, **lengths}
            )


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    logps = _logps(7, dtype=dtype)
    yield Sample("plain", logps)
    yield Sample("kto", logps, {"loss_type": "kto_pair"})
    yield Sample("aot", logps, {"loss_type": "aot"})
    yield Sample("ipo_lengths", logps, {"loss_type": "ipo", **_lengths(7)})
    yield from _samples_of_types(dtype)
    yield from _large(dtype)
    float_lengths = {name: n.to(dtype) for name, n in _lengths(7).items()}
    yield Sample("float_lengths", logps, {"loss_type": "ipo", **float_lengths})
    yield Sample("discopop_default", logps, {"loss_type": "discopop"})
    yield Sample("simpo_default", _logps(7, dtype=dtype, loss_type="simpo"), {"loss_type": "simpo"})
    yield Sample("int_beta", logps, {"beta": 1})
    for count in (15, 16, 17, 1023, 1025, 20000):
        if count < 20000 or dtype == torch.float32:
            yield Sample(f"{count}_pairs", _logps(count, dtype=dtype))

    column = _logps(9, 1, dtype=dtype)
    for reduction in ("mean", "none"):
        yield Sample(f"column_{reduction}", column, {"reduction": reduction})
    yield Sample("column_ipo", column, {"loss_type": "ipo", "reduction": "none", **_lengths(9, 1)})
    yield Sample("column_kto", column, {"loss_type": "kto_pair", "reduction": "none"})
    yield Sample("zero_dimensions", _logps(dtype=dtype), {"reduction": "none"})
    wide = -40 + 8 * torch.randn(6, 8, generator=seeded(6))
    wide = wide.to(dtype).requires_grad_()
    ref = wide.detach()
    sliced = (wide[:, 1], wide[:, 2], ref[:, 3], ref[:, 0])
    for loss_type in ("sigmoid", "aot_unpaired", "apo_zero"):
        yield Sample(f"sliced_{loss_type}", sliced, {"loss_type": loss_type})
    yield Sample("every_other", (wide[0, ::2], wide[1, ::2], ref[2, ::2], ref[3, ::2]))
    yield Sample("transposed", (wide[:3].t(), wide[3:].t(), ref[1:4].t(), ref[:3].t()))
    yield Sample(
        "expanded",
        (wide[0, :1].expand(8), wide[1], ref[2, :1].expand(8), ref[3]),
        {"reduction": "none"},
    )
    yield Sample("chunked", (*wide.reshape(-1).chunk(2), *ref.flip(0).reshape(-1).chunk(2)))
    yield Sample("frozen_chosen", (ref[0], wide[1], ref[2], ref[3]))
    yield Sample("frozen_rejected", (wide[0], ref[1], ref[2], ref[3]), {"loss_type": "nca_pair"})
    yield Sample("frozen", (ref[0], ref[1], ref[2], ref[3]), {"reduction": "none"})
    for name, other in (("float32", torch.float32), ("float16", torch.float16)):
        if dtype in (torch.float32, torch.bfloat16):
            refs = (logps[2].to(other), logps[3].to(other))
            yield Sample(f"{name}_reference", (*logps[:2], *refs), {"reduction": "none"})
            yield Sample(f"{name}_reference_aot", (*logps[:2], *refs), {"loss_type": "aot"})


def of_length(length: int) -> Sample:
    return Sample("", _logps(length, dtype=torch.float32), {"loss_type": "nca_pair"})


def rejected() -> Iterator[Rejected]:
    x = -torch.rand(5)
    refs = (x, x, x, x)

    def call(name, message, error=ValueError, args=refs, **kwargs) -> Rejected:
        return Rejected(name, args, kwargs, error, message)

    yield call("not_a_tensor", "policy_chosen_logps: expected a tensor", TypeError, ([1.0], x))
    yield call("integers", "policy_chosen_logps: expected dtype", TypeError, (x.long(), x))
    yield call("rejected_none", "policy_rejected_logps: expected a tensor", TypeError, (x, None))
    yield call(
        "shapes", r"policy_rejected_logps: .*\(5,\).*got \(5, 1\)", args=(x, x[:, None], x, x)
    )
    yield call("ref_shape", r"ref_rejected_logps: expected shape \(5,\)", args=(x, x, x, x[:2]))
    yield call("ref_dtype", "ref_chosen_logps: expected dtype", TypeError, (x, x, x.long(), x))
    yield call("one_ref", "ref_rejected_logps: expected a tensor", TypeError, (x, x, x))
    yield call("other_ref", "ref_chosen_logps: expected a tensor", TypeError, (x, x, None, x))
    yield call("device", "ref_chosen_logps: .*meta", args=(x, x, x.to("meta"), x))
    grad = x.clone().requires_grad_()
    yield call("ref_grad", "ref_chosen_logps: .*does not require grad", args=(x, x, grad, x))
    yield call("other_ref_grad", "ref_rejected_logps: .*not require", args=(x, x, x, grad))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        yield call(f"beta_{bad}", "beta: expected a finite number above 0", beta=bad)
    yield call("beta_type", "beta: expected a number, got Tensor", TypeError, beta=torch.ones(()))
    yield call("loss_type", "loss_type: .*'sigmoid'.*got 'dpo'", loss_type="dpo")
    yield call("reduction", "reduction: .*'mean'.*got 'batchmean'", reduction="batchmean")
    for bad in (-0.1, 1.0, float("nan")):
        yield call(f"smoothing_{bad}", r"label_smoothing: .*in \[0, 1\)", label_smoothing=bad)
    yield call("smoothing_none", "label_smoothing: expected", TypeError, label_smoothing=None)
    yield call(
        "smoothing_robust", r"label_smoothing: .*0.5\)", loss_type="robust", label_smoothing=0.5
    )
    yield call("smoothing_exo", "label_smoothing: .*above 0 for exo_pair", loss_type="exo_pair")
    for loss_type, options in TYPES.items():
        args = (x, x) if loss_type in WITHOUT_REFERENCE else refs
        lengths = {"chosen_lengths": x, "rejected_lengths": x} if loss_type in NORMALISED else {}

        def other(option, value, loss_type=loss_type, args=args, options=options, lengths=lengths):
            kwargs = {**options, **lengths, "loss_type": loss_type, option: value}
            name = f"{loss_type}_{option}"
            return Rejected(name, args, kwargs, ValueError, f"{option}: expected .*{loss_type}")

        if "label_smoothing" not in options and loss_type != "aot_unpaired":
            yield other("label_smoothing", 0.1)
        if loss_type != "discopop":
            yield other("discopop_tau", 0.05)
        if loss_type != "simpo":
            yield other("simpo_gamma", 0.5)
        if loss_type not in ("ipo", *NORMALISED):
            yield other("chosen_lengths", x)
            yield other("rejected_lengths", x)
        if loss_type in WITHOUT_REFERENCE:
            yield other("ref_chosen_logps", x)
            yield other("ref_rejected_logps", x)
    yield call("tau", "discopop_tau: .*above 0", loss_type="discopop", discopop_tau=0.0)
    yield call("gamma", "simpo_gamma: .*at least 0", args=(x, x), loss_type="simpo", simpo_gamma=-1)
    for given in ({}, {"chosen_lengths": x}, {"rejected_lengths": x}):
        missing = "rejected_lengths" if "chosen_lengths" in given else "chosen_lengths"
        name = f"norm_without_{missing}_{len(given)}"
        message = f"{missing}: expected a tensor"
        yield call(name, message, TypeError, loss_type="sigmoid_norm", **given)
        if given:
            yield call(f"ipo_{name}", message, TypeError, loss_type="ipo", **given)
    yield call(
        "length_shape", r"chosen_lengths: expected shape \(5,\)", loss_type="ipo",
        chosen_lengths=x[:2], rejected_lengths=x,
    )  # fmt: skip
    yield call(
        "length_grad", "rejected_lengths: .*does not require grad", loss_type="ipo",
        chosen_lengths=x, rejected_lengths=grad,
    )  # fmt: skip
    yield call("backend", "backend: .*'cpp'", backend="cpp")


def eager(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
    return loss, (beta * chosen).detach(), (beta * rejected).detach()


def _benchmark(pairs: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Benchmark:
    return Benchmark(
        name=f"{pairs} pairs",
        make=lambda dtype: Sample("", _logps(pairs, dtype=dtype)),
        eager=eager,
        # forward reads four numbers a pair and writes two rewards and two gradients, which backward
        # reads and scales
        bytes_moved=lambda s: s.args[0].numel() * (4 * s.args[0].element_size() + 16),
        backward_bytes_moved=lambda s: s.args[0].numel() * 16,
        devices=devices,
    )


OP = Op(
    name="dpo_loss",
    function=dpo_loss,
    reference=reference.dpo_loss,
    kernels=("dpo_loss_fwd",),
    samples=samples,
    of_length=of_length,
    rejected=rejected,
    source="Rafailov 2023",
    summary="losses of preference pairs, their rewards and gradients",
    benchmarks=(_benchmark(8), _benchmark(65536), _benchmark(2**20, devices=("cuda",))),
)
