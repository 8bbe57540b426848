"""The losses of DPO and its family from hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, reference
from ..common import head, sequences
from ..common.autocast import as_autocast
from .dpo_loss import KERNEL, DPOLoss, dpo_loss

dispatch.register(
    "linear_dpo_loss",
    head.FORWARD,
    head.BACKWARD,
    sequences.FORWARD,
    sequences.BACKWARD,
    KERNEL,
)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    average: bool = False,
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
    """`dpo_loss` of the summed `linear_token_logprobs` of answers: B chosen, then their B rejected.

    The cost and the workspace are the same as in `linear_token_logprobs`. The gradient of a pair
    needs both of its sequences whole, so backward computes the logits again: 8 M D V flops for M
    tokens that count, 4 M D V with a frozen head. Source: Rafailov 2023; Wijmans 2024.

    Args:
        hidden: `(2B, T, D)` float32, bfloat16, float16 or float64; any strides; differentiable.
        weight: `(V, D)`, the output embedding, differentiable; dtypes and autocast as in
            `linear_token_logprobs`.
        token_ids: `(2B, T)` integers in [0, V).
        mask: `(2B, T)`, True counts: the tokens of the answers. Others may hold anything and have
            exactly no gradient; an answer without tokens has a log-probability of 0.
        ref_chosen_logps: `(B,)` in nats; needed where `dpo_loss` needs them.
        ref_rejected_logps: `(B,)`; both or neither.
        bias: `(V,)` or None, differentiable.
        temperature: as in `linear_token_logprobs`; per token `(2B, T)`.
        softcap: see `linear_token_logprobs`.
        logit_scale: see `linear_token_logprobs`.
        average: divide each answer's log-probability by its tokens, as simpo and orpo want.
        beta: as in `dpo_loss`; also all that follows.
        label_smoothing: see `dpo_loss`.
        loss_type: see `dpo_loss`.
        reference_free: see `dpo_loss`.
        reduction: see `dpo_loss`.
        discopop_tau: see `dpo_loss`.
        simpo_gamma: see `dpo_loss`.
        chosen_lengths: `(B,)`, see `dpo_loss`.
        rejected_lengths: `(B,)`, see `dpo_loss`.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(loss, chosen_rewards, rejected_rewards)` as `dpo_loss`.

    Raises:
        ValueError, TypeError: a wrong argument, or an option that the type does not use. An id
            outside [0, V) in a token that counts is a ValueError on the CPU, a NaN on a GPU.
    """
    rows = head.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.dims("hidden", hidden, 3)
    if rows[0] % 2:
        raise ValueError(
            f"hidden: expected an even number of rows, the chosen and then the rejected, got "
            f"shape {tuple(hidden.shape)}"
        )
    head.check_tokens(hidden, token_ids, temperature, mask)
    checks.tensor("mask", mask, (torch.bool, *checks.INTEGERS, *checks.FLOATS))
    checks.flag("average", average)
    pairs = rows[0] // 2
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    backend = dispatch.choose("linear_dpo_loss", hidden.device, backend, hidden.dtype)
    options: dict[str, Any] = {
        "mask": mask, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale,
    }  # fmt: skip
    if backend == "reference":
        logps = reference.linear_token_logprobs(hidden, weight, token_ids, bias=bias, **options)
        sums = reference.sequence_logps(logps, mask, average=average)
    else:
        logps, _ = head.head_logprobs(hidden, weight, bias, token_ids, **options, backend=backend)
        sums = sequences.summed_logps(logps, mask, average, backend)
    return dpo_loss(
        sums[:pairs],
        sums[pairs:],
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
        backend=backend,
    )


class LinearDPOLoss(DPOLoss):
    """`linear_dpo_loss` as a module; its options are the options of `DPOLoss`, and `average`."""

    def __init__(self, *args, average: bool = False, **options) -> None:
        super().__init__(*args, **options)
        self.options["average"] = average

    def forward(  # type: ignore[override]  # other inputs: those of the head come first
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        mask: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, chosen_rewards, rejected_rewards); inputs: the head's arguments and lengths."""
        return linear_dpo_loss(
            hidden,
            weight,
            token_ids,
            mask,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            **inputs,
            **self.options,
        )
