"""The losses of DPO and its family on preference pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ...codes import DPO_LOSS_TYPES, REDUCTIONS
from ...reference.numerics import accumulate_dtype
from ..common.autograd import differentiable_once, gradients, keep, scaled
from ..common.module import LossModule

KERNEL = "dpo_loss_fwd"
dispatch.define(
    "dpo_loss_fwd(Tensor policy_chosen_logps, Tensor policy_rejected_logps, "
    "Tensor? ref_chosen_logps, Tensor? ref_rejected_logps, int loss_type, int reduction, "
    "float beta, float label_smoothing, float discopop_tau, float simpo_gamma) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.register("dpo_loss", KERNEL)

# The kernel is elementwise; these types are its sigmoid or apo_zero of transformed log-ratios.
_TRANSFORMED = {
    "aot": "sigmoid", "aot_unpaired": "sigmoid", "sigmoid_norm": "sigmoid", "kto_pair": "apo_zero",
}  # fmt: skip
_LOSS_TYPES = (*DPO_LOSS_TYPES, *_TRANSFORMED)
_SMOOTHED = frozenset(
    {"sigmoid", "robust", "exo_pair", "simpo", "aot", "aot_unpaired", "sigmoid_norm"}
)
_WITHOUT_REFERENCE = frozenset({"simpo", "orpo"})
_DEFAULT_TAU, _DEFAULT_GAMMA = 0.05, 0.5


class DPOLossCall(NamedTuple):
    """The arguments of the kernel: contiguous pairs `(B,)` of one dtype, and options as numbers."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    loss_type: int
    reduction: int
    beta: float
    label_smoothing: float
    discopop_tau: float
    simpo_gamma: float


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reference_free: bool = False,
    reduction: str = "mean",
    discopop_tau: float | None = None,
    simpo_gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of preference pairs, -log sigmoid(beta * (chosen - rejected)), and their rewards.

    chosen and rejected are the log-ratios of the policy to the reference. One pass forms the loss,
    both rewards and the gradients; the backward pass scales the gradients. `loss_type` replaces the
    formula. The table of `apt_kernels.reference.dpo_loss` has the formulas and their sources:
    sigmoid (the default, Rafailov 2023), robust, hinge, ipo, exo_pair, nca_pair, bco_pair,
    sppo_hard, apo_zero, apo_down, discopop, kto_pair, aot, aot_unpaired, sigmoid_norm, simpo, orpo.

    Args:
        policy_chosen_logps: log-probabilities of the chosen answers in nats, summed over tokens
            (averaged for simpo and orpo; below 0 for orpo); any shape, `(B,)` or `(B, 1)` say;
            float32, bfloat16, float16 or float64; any strides; differentiable.
        policy_rejected_logps: the same for the rejected answers; differentiable.
        ref_chosen_logps: log-probabilities of the chosen answers under the reference model, without
            a gradient. All types but simpo and orpo need them, unless `reference_free`.
        ref_rejected_logps: the same for the rejected answers; both or neither.
        beta: strength of the reference, above 0.
        label_smoothing: probability in [0, 1) that a label is wrong; below 0.5 for robust, above 0
            for exo_pair; 0 for types without smoothing.
        loss_type: one of those above.
        reference_free: True takes the log-probabilities of the reference as 0, also where they are
            given.
        reduction: "mean" (0 for no pairs), "sum" or "none" (sorted pairs, for aot, aot_unpaired).
        discopop_tau: for discopop alone; None means 0.05.
        simpo_gamma: for simpo alone; None means 0.5.
        chosen_lengths: tokens of the chosen answers in the shape of the log-probabilities, at
            least 1, for sigmoid_norm (required) and ipo (optional): log-ratios become averages.
        rejected_lengths: the same for the rejected answers.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, chosen_rewards, rejected_rewards)`: the loss 0-dim, or in the shape of the inputs
        for "none"; the rewards beta * log-ratio, in that shape, without a graph. float32 (float64
        for float64 inputs).

    Raises:
        ValueError, TypeError: a wrong argument, or an option that the type does not use.
    """
    _check_options(
        loss_type, beta, label_smoothing, reference_free, reduction, discopop_tau, simpo_gamma
    )
    _check_pairs(
        loss_type,
        reference_free,
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
    )
    if chosen_lengths is not None or rejected_lengths is not None or loss_type == "sigmoid_norm":
        _check_lengths(loss_type, chosen_lengths, rejected_lengths, policy_chosen_logps)
    backend = dispatch.choose(
        "dpo_loss", policy_chosen_logps.device, backend, policy_chosen_logps.dtype
    )
    if reference_free:
        ref_chosen_logps = ref_rejected_logps = None
    shape = policy_chosen_logps.shape
    if len(shape) != 1:
        policy_chosen_logps = policy_chosen_logps.reshape(-1)
        policy_rejected_logps = policy_rejected_logps.reshape(-1)
        ref_chosen_logps, ref_rejected_logps = _flat(ref_chosen_logps), _flat(ref_rejected_logps)
        chosen_lengths, rejected_lengths = _flat(chosen_lengths), _flat(rejected_lengths)
    if backend == "reference":
        results = reference.dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=beta,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            reference_free=reference_free,
            reduction=reduction,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
    else:
        call = DPOLossCall(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            loss_type=DPO_LOSS_TYPES[_TRANSFORMED.get(loss_type, loss_type)],
            reduction=REDUCTIONS[reduction],
            beta=float(beta),
            label_smoothing=float(label_smoothing),
            discopop_tau=_DEFAULT_TAU if discopop_tau is None else float(discopop_tau),
            simpo_gamma=_DEFAULT_GAMMA if simpo_gamma is None else float(simpo_gamma),
        )
        if loss_type in _TRANSFORMED or chosen_lengths is not None:
            results = _loss_of_transformed(
                loss_type, call, chosen_lengths, rejected_lengths, backend
            )
        else:
            results = _loss(call, backend)
    if len(shape) == 1:
        return results
    loss, chosen_rewards, rejected_rewards = (x.reshape(shape) if x.dim() else x for x in results)
    return loss, chosen_rewards, rejected_rewards


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1)


def _check_options(
    loss_type: str,
    beta: float,
    label_smoothing: float,
    reference_free: bool,
    reduction: str,
    discopop_tau: float | None,
    simpo_gamma: float | None,
) -> None:
    checks.choice("loss_type", loss_type, _LOSS_TYPES)
    checks.positive("beta", beta)
    checks.flag("reference_free", reference_free)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.between("label_smoothing", label_smoothing, 0, 1, open_end=True)
    if loss_type == "exo_pair" and not label_smoothing:
        raise ValueError("label_smoothing: expected a number above 0 for exo_pair, got 0")
    if label_smoothing and loss_type not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing: expected 0, as {loss_type} has no smoothing, got {label_smoothing}"
        )
    if loss_type == "robust":
        checks.between("label_smoothing", label_smoothing, 0, 0.5, open_end=True)
    if discopop_tau is not None:
        if loss_type != "discopop":
            checks.unused("discopop_tau", discopop_tau, f"{loss_type} has none")
        checks.positive("discopop_tau", discopop_tau)
    if simpo_gamma is not None:
        if loss_type != "simpo":
            checks.unused("simpo_gamma", simpo_gamma, f"{loss_type} has none")
        checks.at_least_zero("simpo_gamma", simpo_gamma)


def _check_pairs(
    loss_type: str,
    reference_free: bool,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
) -> None:
    like, chosen = "policy_chosen_logps", policy_chosen_logps
    checks.tensor(like, chosen)
    if ref_chosen_logps is None and ref_rejected_logps is None:
        checks.pair("policy_rejected_logps", policy_rejected_logps, like, chosen)
        if not reference_free and loss_type not in _WITHOUT_REFERENCE:
            raise ValueError(
                f"ref_chosen_logps: expected the reference's log-probabilities, as {loss_type} "
                "compares with a reference, or reference_free=True, got None"
            )
        return
    if loss_type in _WITHOUT_REFERENCE:
        checks.unused("ref_chosen_logps", ref_chosen_logps, f"{loss_type} has no reference")
        checks.unused("ref_rejected_logps", ref_rejected_logps, f"{loss_type} has no reference")
    checks.pairs(
        like,
        chosen,
        constants=("ref_chosen_logps", "ref_rejected_logps"),
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )


def _check_lengths(
    loss_type: str,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    policy_chosen_logps: Tensor,
) -> None:
    for name, lengths in (
        ("chosen_lengths", chosen_lengths),
        ("rejected_lengths", rejected_lengths),
    ):
        if loss_type not in ("ipo", "sigmoid_norm"):
            checks.unused(name, lengths, f"{loss_type} is not normalised by length")
            continue
        lengths = checks.tensor(name, lengths, (*checks.INTEGERS, *checks.FLOATS))
        checks.shape(name, lengths, policy_chosen_logps.shape, "that of policy_chosen_logps")
        checks.same_device(name, lengths, "policy_chosen_logps", policy_chosen_logps)
        checks.constant(name, lengths)


def _loss(call: DPOLossCall, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both rewards by the kernel, which takes contiguous pairs of one dtype."""
    dtype = call.policy_chosen_logps.dtype
    for t in (
        call.policy_chosen_logps,
        call.policy_rejected_logps,
        call.ref_chosen_logps,
        call.ref_rejected_logps,
    ):
        if t is not None and not (t.dtype == dtype and t.is_contiguous()):
            call = _contiguous(call)
            break
    return _DPOLoss.apply(*call, backend)


def _contiguous(call: DPOLossCall) -> DPOLossCall:
    """The call with contiguous pairs of their common dtype, else of the first's accumulation."""
    pairs: dict[str, Any] = {k: t for k, t in call._asdict().items() if isinstance(t, Tensor)}
    dtype = call.policy_chosen_logps.dtype
    if any(t.dtype != dtype for t in pairs.values()):
        dtype = accumulate_dtype(call.policy_chosen_logps)
    return call._replace(**{name: t.to(dtype).contiguous() for name, t in pairs.items()})


def _loss_of_transformed(
    loss_type: str,
    call: DPOLossCall,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's sigmoid, ipo or apo_zero of other log-ratios; rewards are of the given ones."""
    dtype = accumulate_dtype(call.policy_chosen_logps)
    policy_chosen, policy_rejected = (
        t.to(dtype) for t in (call.policy_chosen_logps, call.policy_rejected_logps)
    )
    ref_chosen, ref_rejected = (
        torch.zeros_like(policy_chosen) if t is None else t.to(dtype)
        for t in (call.ref_chosen_logps, call.ref_rejected_logps)
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    rewards = (call.beta * chosen).detach(), (call.beta * rejected).detach()
    mean_rejected = mean_chosen = None
    if loss_type == "kto_pair":  # (S(-b (c - z_r)) + S(b (r - z_c))) / 2, z without gradient
        count = max(chosen.numel(), 1)
        mean_rejected, mean_chosen = (
            (x.detach().sum() / count).clamp(min=0).expand_as(x) for x in (rejected, chosen)
        )
    elif loss_type == "aot":
        chosen = torch.sort(policy_chosen - policy_rejected).values
        rejected = torch.sort(ref_chosen - ref_rejected).values
    elif loss_type == "aot_unpaired":
        chosen, rejected = torch.sort(chosen).values, torch.sort(rejected).values
    else:
        assert chosen_lengths is not None and rejected_lengths is not None  # they were checked
        chosen = chosen / chosen_lengths.clamp(min=1)
        rejected = rejected / rejected_lengths.clamp(min=1)
    call = call._replace(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=mean_rejected,
        ref_rejected_logps=mean_chosen,
    )
    loss = _loss(call, backend)[0]
    return (0.5 * loss if loss_type == "kto_pair" else loss), *rewards


class _DPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend = arguments
        call = DPOLossCall._make(fields)
        loss, chosen_rewards, rejected_rewards, formed = dispatch.kernel(KERNEL, backend)(*call)
        keep(
            ctx,
            formed,
            call,
            call.policy_chosen_logps,
            call.policy_rejected_logps,
            call.ref_chosen_logps,
            call.ref_rejected_logps,
        )
        ctx.dtype, ctx.backend = call.policy_chosen_logps.dtype, backend
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)  # the rewards' gradients would be zeros, each a tensor
        return loss, chosen_rewards, rejected_rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, *_):
        grads = scaled(ctx, grad_loss, lambda call: dispatch.kernel(KERNEL, ctx.backend)(*call)[3])
        if grads.dtype != ctx.dtype:
            grads = grads.to(ctx.dtype)
        grad_chosen, grad_rejected = grads.unbind()
        return gradients(
            DPOLossCall, policy_chosen_logps=grad_chosen, policy_rejected_logps=grad_rejected
        )


@dispatch.fake(KERNEL)
def _(*fields):
    call = DPOLossCall(*fields)
    pairs = call.policy_chosen_logps
    dtype = accumulate_dtype(pairs)
    shapes = (pairs.shape, pairs.shape, (2, *pairs.shape))
    chosen_rewards, rejected_rewards, formed = (pairs.new_empty(s, dtype=dtype) for s in shapes)
    loss = pairs.new_empty(pairs.shape if call.reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return loss, chosen_rewards, rejected_rewards, formed


class DPOLoss(LossModule):
    """`dpo_loss` as a module. Its arguments are the options of the function."""

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: str = "sigmoid",
        *,
        reference_free: bool = False,
        reduction: str = "mean",
        discopop_tau: float | None = None,
        simpo_gamma: float | None = None,
        backend: str | None = None,
    ) -> None:
        _check_options(
            loss_type, beta, label_smoothing, reference_free, reduction, discopop_tau, simpo_gamma
        )
        super().__init__(
            beta=beta,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            reference_free=reference_free,
            reduction=reduction,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            backend=backend,
        )

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, chosen_rewards, rejected_rewards); arguments as `apt_kernels.dpo_loss`."""
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **self.options,
        )
