"""Generalised advantage estimation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import arrays, dispatch, reference
from ...reference.numerics import accumulate_dtype
from .gae_arguments import check_bootstrap, check_flags, check_options, check_steps

if TYPE_CHECKING:
    from numpy import ndarray

dispatch.define(
    "gae_fwd(Tensor rewards, Tensor values, Tensor? mask, Tensor? terminated, "
    "Tensor? truncated, Tensor? bootstrap, Tensor? cu_seqlens, float gamma, "
    "float gae_lambda, bool whiten, bool time_major) -> (Tensor, Tensor)"
)
dispatch.register("gae", "gae_fwd")


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
    """A_t = delta_t + gamma * gae_lambda * A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t; A + V.

    One pass, which reads every input once and writes both results; whitening adds two passes over
    the advantages. Source: Schulman 2016, "High-dimensional continuous control using generalized
    advantage estimation", eq. 16. No gradient. NumPy arrays give NumPy arrays, without a copy.

    Args:
        rewards: `(B, T)`; `(T, B)` if `time_major`; `(N,)` with `cu_seqlens`. float32, bfloat16,
            float16 or float64; any strides.
        values: as `rewards`.
        gamma: discount of a step, in [0, 1].
        gae_lambda: decay of the trace, in [0, 1].
        mask: as `rewards`, True counts. Steps that do not count are passed over: t+1 is the next
            step that counts. Their outputs are 0 whatever any argument holds there.
        terminated: as `rewards`: the episode ended here; V_(t+1) is 0 and the trace is cut.
        truncated: as `rewards`: the episode was interrupted here; V_(t+1) is the bootstrap and
            the trace is cut. A step of both kinds is terminated.
        bootstrap: `(B,)` (`(S,)` with `cu_seqlens`): the value of the state after the last step
            that counts, 0 after other truncated steps; or, shaped as `rewards`, the value after
            each truncated step and after the last. None: 0.
        whiten: bring the advantages that count to mean 0 and (unbiased) variance 1.
        time_major: time is the first dimension; nothing is copied.
        cu_seqlens: `(S + 1,)` int64 or int32: where each packed sequence starts, and N. Offsets
            that fall or end elsewhere: an error on the CPU, undefined results on the GPU.
        backend: None for the fastest, or a name of `apt_kernels.backends()`.

    Returns:
        `(advantages, returns)` as `rewards`, contiguous; float32, or float64 where rewards or
        values are. Returns are A + V before whitening.

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    if arrays.is_array(rewards):
        named = {
            "rewards": rewards, "values": values, "mask": mask, "terminated": terminated,
            "truncated": truncated, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        results = gae(
            **{name: arrays.shared(name, value) for name, value in named.items()}, gamma=gamma,
            gae_lambda=gae_lambda, whiten=whiten, time_major=time_major, backend=backend,
        )  # fmt: skip
        return results[0].numpy(), results[1].numpy()
    check_options(gamma, gae_lambda, whiten, time_major)
    check_steps(rewards, values, time_major, cu_seqlens)
    flags = {"mask": mask, "terminated": terminated, "truncated": truncated}
    check_flags(rewards, **flags)
    check_bootstrap(bootstrap, rewards, time_major, cu_seqlens)
    backend = dispatch.choose("gae", rewards.device, backend, rewards.dtype)
    if backend == "reference":
        return reference.gae(
            rewards, values, gamma=gamma, gae_lambda=gae_lambda, bootstrap=bootstrap,
            whiten=whiten, time_major=time_major, cu_seqlens=cu_seqlens, **flags,
        )  # fmt: skip
    if values.dtype != rewards.dtype:
        dtype = accumulate_dtype(rewards, values)
        rewards, values = rewards.to(dtype), values.to(dtype)
    if bootstrap is not None:
        bootstrap = bootstrap.to(accumulate_dtype(rewards))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    return dispatch.kernel("gae_fwd", backend)(
        rewards, values, _bool(mask), _bool(terminated), _bool(truncated), bootstrap, cu_seqlens,
        float(gamma), float(gae_lambda), whiten, time_major,
    )  # fmt: skip


def _bool(flags: Tensor | None) -> Tensor | None:
    return flags if flags is None or flags.dtype == torch.bool else flags != 0


@dispatch.fake("gae_fwd")
def _(rewards, values, *arguments):
    dtype = accumulate_dtype(rewards)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(
        rewards.shape, dtype=dtype
    )
