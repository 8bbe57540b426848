"""Generalised advantage estimation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from ... import arrays, checks, dispatch, reference
from ...reference.numerics import accumulate_dtype
from ..common.token_inputs import boolean

if TYPE_CHECKING:
    from numpy import ndarray

KERNEL = "gae_fwd"
dispatch.define(
    "gae_fwd(Tensor rewards, Tensor values, Tensor? mask, Tensor? terminated, "
    "Tensor? truncated, Tensor? bootstrap, Tensor? cu_seqlens, float gamma, "
    "float gae_lambda, bool whiten, bool time_major) -> (Tensor, Tensor)"
)
dispatch.register("gae", KERNEL)


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = ...,
    gae_lambda: float = ...,
    mask: Tensor | None = ...,
    terminated: Tensor | None = ...,
    truncated: Tensor | None = ...,
    bootstrap: Tensor | None = ...,
    whiten: bool = ...,
    time_major: bool = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: ndarray,
    values: ndarray,
    *,
    gamma: float = ...,
    gae_lambda: float = ...,
    mask: ndarray | None = ...,
    terminated: ndarray | None = ...,
    truncated: ndarray | None = ...,
    bootstrap: ndarray | None = ...,
    whiten: bool = ...,
    time_major: bool = ...,
    cu_seqlens: ndarray | None = ...,
    backend: str | None = ...,
) -> tuple[ndarray, ndarray]: ...
@torch.no_grad()
def gae(
    rewards: Tensor | ndarray,
    values: Tensor | ndarray,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    mask: Tensor | ndarray | None = None,
    terminated: Tensor | ndarray | None = None,
    truncated: Tensor | ndarray | None = None,
    bootstrap: Tensor | ndarray | None = None,
    whiten: bool = False,
    time_major: bool = False,
    cu_seqlens: Tensor | ndarray | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[ndarray, ndarray]:
    """Generalised advantages A_t = delta_t + gamma * gae_lambda * A_(t+1), and returns A + V.

    delta_t is r_t + gamma V_(t+1) - V_t. One pass reads every input once and writes both results;
    whitening adds two passes over the advantages. No gradient is computed. NumPy arrays give NumPy
    arrays, without a copy. Source: Schulman 2016, "High-dimensional continuous control using
    generalized advantage estimation", eq. 16.

    Args:
        rewards: `(B, T)`; `(T, B)` if `time_major`; `(N,)` with `cu_seqlens`. float32, bfloat16,
            float16 or float64; any strides.
        values: as `rewards`.
        gamma: discount of a step, in [0, 1].
        gae_lambda: decay of the trace, in [0, 1].
        mask: as `rewards`, True counts. Steps that do not count are passed over: t+1 is the next
            step that counts. Their outputs are 0, whatever any argument holds there.
        terminated: as `rewards`, True where the episode ended: V_(t+1) is 0 and the trace is cut.
        truncated: as `rewards`, True where the episode was interrupted: V_(t+1) is the bootstrap
            and the trace is cut. A step of both kinds is terminated.
        bootstrap: `(B,)` (`(S,)` with `cu_seqlens`): the value of the state after the last step
            that counts, while the value after other truncated steps is 0. Or, in the shape of
            `rewards`, the value after each truncated step and after the last. None means 0.
        whiten: True brings the advantages that count to mean 0 and (unbiased) variance 1.
        time_major: True if time is the first dimension; nothing is copied.
        cu_seqlens: `(S + 1,)` int64 or int32: where each packed sequence starts, and N at the end.
            Offsets that fall or end elsewhere are an error on the CPU and give undefined results on
            the GPU.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(advantages, returns)` in the shape of `rewards`, contiguous; float32, or float64 if
        rewards or values are float64. Returns are A + V before whitening.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    inputs: dict[str, Any] = {
        "rewards": rewards, "values": values, "mask": mask, "terminated": terminated,
        "truncated": truncated, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    as_arrays = arrays.is_array(rewards)
    if as_arrays:
        inputs = {name: arrays.shared(name, value) for name, value in inputs.items()}
    advantages, returns = _of_tensors(
        **inputs, gamma=gamma, gae_lambda=gae_lambda, whiten=whiten, time_major=time_major,
        backend=backend,
    )  # fmt: skip
    return (advantages.numpy(), returns.numpy()) if as_arrays else (advantages, returns)


def _of_tensors(
    *,
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,
    whiten: bool,
    time_major: bool,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`gae` of tensors."""
    _check_options(gamma, gae_lambda, whiten, time_major)
    _check_steps(rewards, values, time_major, cu_seqlens)
    _check_flags(rewards, mask=mask, terminated=terminated, truncated=truncated)
    _check_bootstrap(bootstrap, rewards, time_major, cu_seqlens)
    backend = dispatch.choose("gae", rewards.device, backend, rewards.dtype)
    if backend == "reference":
        return reference.gae(
            rewards,
            values,
            gamma=gamma,
            gae_lambda=gae_lambda,
            mask=mask,
            terminated=terminated,
            truncated=truncated,
            bootstrap=bootstrap,
            whiten=whiten,
            time_major=time_major,
            cu_seqlens=cu_seqlens,
        )
    if values.dtype != rewards.dtype:
        dtype = accumulate_dtype(rewards, values)
        rewards, values = rewards.to(dtype), values.to(dtype)
    call = GAECall(
        rewards=rewards,
        values=values,
        mask=None if mask is None else boolean(mask),
        terminated=None if terminated is None else boolean(terminated),
        truncated=None if truncated is None else boolean(truncated),
        bootstrap=None if bootstrap is None else bootstrap.to(accumulate_dtype(rewards)),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        gamma=float(gamma),
        gae_lambda=float(gae_lambda),
        whiten=whiten,
        time_major=time_major,
    )
    return dispatch.kernel(KERNEL, backend)(*call)


def _check_options(gamma: float, gae_lambda: float, whiten: bool, time_major: bool) -> None:
    checks.between("gamma", gamma, 0, 1)
    checks.between("gae_lambda", gae_lambda, 0, 1)
    checks.flag("whiten", whiten)
    checks.flag("time_major", time_major)


def _check_steps(
    rewards: Tensor, values: Tensor, time_major: bool, cu_seqlens: Tensor | None
) -> None:
    checks.tensor("rewards", rewards)
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
    checks.dims("rewards", rewards, 2 if cu_seqlens is None else 1)
    checks.pair("values", values, "rewards", rewards)
    if cu_seqlens is None:
        return
    if time_major:
        raise ValueError(
            "time_major: expected False (packed sequences have one dimension), got True"
        )
    checks.dims("cu_seqlens", cu_seqlens, 1)
    checks.same_device("cu_seqlens", cu_seqlens, "rewards", rewards)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected at least one offset, got none")


def _check_flags(rewards: Tensor, **flags: Tensor | None) -> None:
    for name, flag in flags.items():
        if flag is not None:
            checks.token_mask(name, flag, "rewards", rewards)


def _check_bootstrap(
    bootstrap: Tensor | None, rewards: Tensor, time_major: bool, cu_seqlens: Tensor | None
) -> None:
    if bootstrap is None:
        return
    checks.tensor("bootstrap", bootstrap)
    checks.same_device("bootstrap", bootstrap, "rewards", rewards)
    if cu_seqlens is not None:
        rows = cu_seqlens.shape[0] - 1
    else:
        rows = rewards.shape[1 if time_major else 0]
    if tuple(bootstrap.shape) not in ((rows,), tuple(rewards.shape)):
        raise ValueError(
            f"bootstrap: expected shape {(rows,)} (one a sequence) or {tuple(rewards.shape)} "
            f"(one a step), got {tuple(bootstrap.shape)}"
        )


class GAECall(NamedTuple):
    """The arguments of the kernel: steps of one dtype and any strides, flags as booleans."""

    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    terminated: Tensor | None
    truncated: Tensor | None
    bootstrap: Tensor | None
    cu_seqlens: Tensor | None
    gamma: float
    gae_lambda: float
    whiten: bool
    time_major: bool


@dispatch.fake(KERNEL)
def _(*fields):
    rewards = GAECall(*fields).rewards
    advantages = rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards))
    return advantages, torch.empty_like(advantages)
