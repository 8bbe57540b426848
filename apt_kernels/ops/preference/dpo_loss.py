"""The losses of DPO and its family on preference pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.autograd import keep, scaled
from ..common.once import differentiable_once

KERNEL = "dpo_loss_fwd"
dispatch.register("dpo_loss", KERNEL)

# The argument `loss_type` of the kernel, which is elementwise; the types of the second row are the
# kernel's sigmoid or apo_zero of transformed log-ratios.
_CODES = {
    "sigmoid": 0, "robust": 1, "hinge": 2, "ipo": 3, "exo_pair": 4, "nca_pair": 5, "bco_pair": 6,
    "sppo_hard": 7, "apo_zero": 8, "apo_down": 9, "discopop": 10, "simpo": 11, "orpo": 12,
    "aot": 0, "aot_unpaired": 0, "sigmoid_norm": 0, "kto_pair": 8,
}  # fmt: skip
_TRANSFORMED = frozenset({"aot", "aot_unpaired", "sigmoid_norm", "kto_pair"})
_SMOOTHED = frozenset(
    {"sigmoid", "robust", "exo_pair", "simpo", "aot", "aot_unpaired", "sigmoid_norm"}
)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DEFAULT_TAU, _DEFAULT_GAMMA = 0.05, 0.5


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
    """-log sigmoid(beta * (log-ratio of chosen - of rejected)), or another `loss_type`; rewards.

    One pass forms the loss, both rewards and the gradients; backward scales them. The formulas of
    the types, with their sources, are the table of `apt_kernels.reference.dpo_loss`: sigmoid (the
    default, Rafailov 2023), robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down, discopop, kto_pair, aot, aot_unpaired, sigmoid_norm, simpo, orpo.

    Args:
        policy_chosen_logps: log-probabilities of the chosen answers in nats, summed over tokens
            (averaged for simpo and orpo; below 0 for orpo); any shape, `(B,)` or `(B, 1)` say;
            float32, bfloat16, float16 or float64; any strides; differentiable.
        policy_rejected_logps: the same of the rejected answers; differentiable.
        ref_chosen_logps: the reference's (no gradient). simpo and orpo have none; all other types
            need them, or `reference_free=True`.
        ref_rejected_logps: the same of the rejected answers; both or neither.
        beta: strength of the reference, above 0.
        label_smoothing: probability in [0, 1) that a label is wrong; below 0.5 for robust, above 0
            for exo_pair; 0 for types without smoothing.
        loss_type: one of those above.
        reference_free: take the reference as 0, whether it is given or not.
        reduction: "mean" (0 for no pairs), "sum" or "none" (sorted pairs, for aot, aot_unpaired).
        discopop_tau: for discopop alone; None means 0.05.
        simpo_gamma: for simpo alone; None means 0.5.
        chosen_lengths: tokens of the chosen answers in the shape of the log-probabilities, at
            least 1, for sigmoid_norm (required) and ipo (optional): log-ratios become averages.
        rejected_lengths: the same of the rejected answers.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, chosen_rewards, rejected_rewards)`: the loss 0-dim, or in the shape of the inputs
        for "none"; the rewards beta * log-ratio, in that shape, without a graph. float32 (float64
        for float64 inputs).

    Raises:
        ValueError, TypeError: a wrong argument, or an option that the type does not use.
    """
    _check_options(loss_type, beta, label_smoothing, reduction, discopop_tau, simpo_gamma)
    checks.flag("reference_free", reference_free)
    pc, pr = policy_chosen_logps, policy_rejected_logps
    rc, rr = ref_chosen_logps, ref_rejected_logps
    _check_pairs(loss_type, pc, pr, rc, rr, reference_free)
    if chosen_lengths is not None or rejected_lengths is not None or loss_type == "sigmoid_norm":
        _check_lengths(loss_type, chosen_lengths, rejected_lengths, pc)
    backend = dispatch.choose("dpo_loss", pc.device, backend, pc.dtype)
    if reference_free:
        rc = rr = None
    one_dimension = pc.dim() == 1
    if not one_dimension:
        pc, pr, rc, rr = _flat(pc), _flat(pr), _flat(rc), _flat(rr)
        chosen_lengths, rejected_lengths = _flat(chosen_lengths), _flat(rejected_lengths)
    if backend == "reference":
        results = reference.dpo_loss(
            pc,
            pr,
            rc,
            rr,
            beta=beta,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            reduction=reduction,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
    else:
        extra = 0.0
        if loss_type == "discopop":
            extra = _DEFAULT_TAU if discopop_tau is None else discopop_tau
        elif loss_type == "simpo":
            extra = _DEFAULT_GAMMA if simpo_gamma is None else simpo_gamma
        options = (
            _CODES[loss_type], _REDUCTIONS[reduction], float(beta), float(label_smoothing),
            float(extra), backend,
        )  # fmt: skip
        if chosen_lengths is not None or loss_type in _TRANSFORMED:
            lengths = (chosen_lengths, rejected_lengths)
            results = _loss_of_transformed(loss_type, pc, pr, rc, rr, lengths, options)
        else:
            results = _loss(pc, pr, rc, rr, options)
    if one_dimension:
        return results
    loss, *rewards = (x.reshape(policy_chosen_logps.shape) if x.dim() else x for x in results)
    return loss, *rewards


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1)


def _check_options(
    loss_type: str,
    beta: float,
    label_smoothing: float,
    reduction: str,
    discopop_tau: float | None,
    simpo_gamma: float | None,
) -> None:
    checks.choice("loss_type", loss_type, _CODES)
    checks.positive("beta", beta)
    checks.choice("reduction", reduction, _REDUCTIONS)
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
    pc: Tensor,
    pr: Tensor,
    rc: Tensor | None,
    rr: Tensor | None,
    reference_free: bool,
) -> None:
    checks.tensor("policy_chosen_logps", pc)
    checks.pair("policy_rejected_logps", pr, "policy_chosen_logps", pc)
    has_reference = loss_type not in ("simpo", "orpo")
    if rc is None and rr is None:
        if has_reference and not reference_free:
            raise ValueError(
                f"ref_chosen_logps: expected the reference's log-probabilities, as {loss_type} "
                "compares with a reference, or reference_free=True, got None"
            )
        return
    if not has_reference:
        checks.unused("ref_chosen_logps", rc, f"{loss_type} has no reference")
        checks.unused("ref_rejected_logps", rr, f"{loss_type} has no reference")
    checks.pair("ref_chosen_logps", rc, "policy_chosen_logps", pc, constant_=True)
    checks.pair("ref_rejected_logps", rr, "policy_chosen_logps", pc, constant_=True)


def _check_lengths(
    loss_type: str, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None, pc: Tensor
) -> None:
    for name, lengths in (
        ("chosen_lengths", chosen_lengths),
        ("rejected_lengths", rejected_lengths),
    ):
        if loss_type not in ("ipo", "sigmoid_norm"):
            checks.unused(name, lengths, f"{loss_type} is not normalised by length")
            continue
        checks.tensor(name, lengths, (*checks.INTEGERS, *checks.FLOATS))
        checks.shape(name, lengths, pc.shape, "that of policy_chosen_logps")
        checks.same_device(name, lengths, "policy_chosen_logps", pc)
        checks.constant(name, lengths)


def _loss(
    pc: Tensor, pr: Tensor, rc: Tensor | None, rr: Tensor | None, options: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's loss of contiguous pairs of one dtype."""
    dtype = pc.dtype
    if pr.dtype != dtype or (rc is not None and not rc.dtype == rr.dtype == dtype):
        dtype = accumulate_dtype(pc)
        pc, pr = pc.to(dtype), pr.to(dtype)
        rc, rr = (None, None) if rc is None else (rc.to(dtype), rr.to(dtype))
    if rc is not None:
        rc, rr = rc.contiguous(), rr.contiguous()
    return _DpoLoss.apply(pc.contiguous(), pr.contiguous(), rc, rr, *options)


def _loss_of_transformed(
    loss_type: str,
    pc: Tensor,
    pr: Tensor,
    rc: Tensor | None,
    rr: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
    options: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's sigmoid, ipo or apo_zero of other differences; the rewards stay beta (c, r)."""
    dtype = accumulate_dtype(pc)
    pc, pr = pc.to(dtype), pr.to(dtype)
    rc, rr = (torch.zeros_like(pc), torch.zeros_like(pr)) if rc is None else (rc, rr)
    c, r = pc - rc.to(dtype), pr - rr.to(dtype)
    beta = options[2]
    rewards = (beta * c).detach(), (beta * r).detach()
    if loss_type == "kto_pair":  # (S(-b (c - z_r)) + S(b (r - z_c))) / 2, z without gradient
        count = max(c.numel(), 1)
        z_c, z_r = ((x.detach().sum() / count).clamp(min=0).expand_as(x) for x in (c, r))
        return 0.5 * _loss(c, r, z_r, z_c, options)[0], *rewards
    if loss_type == "aot":
        c, r = torch.sort(pc - pr).values, torch.sort(rc.to(dtype) - rr.to(dtype)).values
    elif loss_type == "aot_unpaired":
        c, r = torch.sort(c).values, torch.sort(r).values
    else:
        c, r = (x / n.clamp(min=1) for x, n in zip((c, r), lengths, strict=True))
    return _loss(c, r, None, None, options)[0], *rewards


class DPOLoss(nn.Module):
    """`dpo_loss` as a module; its arguments are the options of the function."""

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
        super().__init__()
        _check_options(loss_type, beta, label_smoothing, reduction, discopop_tau, simpo_gamma)
        self.options = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "loss_type": loss_type,
            "reference_free": reference_free,
            "reduction": reduction,
            "discopop_tau": discopop_tau,
            "simpo_gamma": simpo_gamma,
            "backend": backend,
        }

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
        """(loss, chosen_rewards, rejected_rewards)."""
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)


class _DpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pc, pr, rc, rr, code, reduction, beta, label_smoothing, extra, backend):
        options = (code, reduction, beta, label_smoothing, extra)
        loss, chosen_rewards, rejected_rewards, grads = dispatch.kernel(KERNEL, backend)(
            pc, pr, rc, rr, *options
        )
        keep(ctx, grads, pc, pr, rc, rr)
        ctx.dtype, ctx.options = pc.dtype, (*options, backend)
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)  # the rewards' gradients would be zeros, each a tensor
        return loss, chosen_rewards, rejected_rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, *_):
        *options, backend = ctx.options
        kernel = dispatch.kernel(KERNEL, backend)
        grads = scaled(ctx, grad_loss, lambda *inputs: kernel(*inputs, *options)[3])
        if grads.dtype != ctx.dtype:
            grads = grads.to(ctx.dtype)
        grad_chosen, grad_rejected = grads.unbind()
        return grad_chosen, grad_rejected, None, None, None, None, None, None, None, None


@dispatch.fake(KERNEL)
def _(pc, pr, rc, rr, code, reduction, *options):
    dtype = accumulate_dtype(pc)
    chosen_rewards, rejected_rewards, grads = (
        pc.new_empty(shape, dtype=dtype) for shape in (pc.shape, pc.shape, (2, *pc.shape))
    )
    loss = pc.new_empty(pc.shape if reduction == 0 else (), dtype=dtype)
    return loss, chosen_rewards, rejected_rewards, grads
