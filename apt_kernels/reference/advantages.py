"""Advantages: generalised advantage estimation, and those of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import accumulate_dtype, keep

WHITEN_EPSILON = 1e-8


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    time_major: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns A_t = delta_t + gamma * gae_lambda * A_(t+1) and the returns A + V.

    delta_t = r_t + gamma V_(t+1) - V_t. Source: Schulman 2016, "High-dimensional continuous
    control using generalized advantage estimation", eq. 16.

    Args:
        rewards: `(B, T)`; `(T, B)` if `time_major`; `(N,)` with `cu_seqlens`.
        values: as `rewards`.
        gamma: the discount of a step.
        gae_lambda: the decay of the trace.
        mask: as `rewards`, True counts. Steps that do not count are passed over: t+1 is the next
            step that counts, and their outputs are 0, whatever they hold.
        terminated: as `rewards`: the episode ended here, V_(t+1) = 0 and the trace is cut.
        truncated: as `rewards`: the episode was interrupted here, V_(t+1) is the bootstrap and the
            trace is cut. A step of both kinds is terminated.
        bootstrap: the value of the state after the last step that counts, one a sequence, `(B,)`
            (`(S,)` with `cu_seqlens`), 0 after other truncated steps; or, shaped as `rewards`,
            after each truncated step and the last. None: 0.
        whiten: bring the advantages that count to mean 0 and (unbiased) variance 1, the returns
            unchanged.
        time_major: time is the first dimension.
        cu_seqlens: `(S + 1,)`, where each packed sequence starts, and the end of the last.

    Returns:
        `(advantages, returns)`, as `rewards`, without gradient.
    """
    dtype = accumulate_dtype(rewards, values)

    def rows(x: Tensor | None) -> Tensor | None:  # one row a sequence, or one row of them all
        if x is None:
            return None
        return x.unsqueeze(0) if cu_seqlens is not None else x.mT if time_major else x

    r, v = rows(rewards).to(dtype), rows(values).to(dtype)
    counts = torch.ones_like(v, dtype=torch.bool) if mask is None else rows(mask).bool()
    sequence = _sequence_of(v, cu_seqlens)
    following, last = _next_step_that_counts(counts, sequence)
    never = torch.zeros_like(counts)
    ends = never if terminated is None else rows(terminated).bool()
    breaks = never if truncated is None else rows(truncated).bool()
    if bootstrap is None:
        after = torch.zeros_like(v)
    elif bootstrap.shape == (len(v) if cu_seqlens is None else len(cu_seqlens) - 1,):
        after = keep(last, bootstrap.to(dtype)[sequence])
    else:
        after = rows(bootstrap).to(dtype)
    r, v = keep(counts, r), keep(counts, v)
    next_values = torch.where(last | breaks, after, v.gather(-1, following))
    deltas = keep(counts, r + gamma * keep(~ends, next_values) - v)
    # a step that does not count hands the trace on
    decays = torch.full_like(v, gamma * gae_lambda).masked_fill(~counts, 1.0)
    cut = counts & (ends | breaks | last)
    advantages = keep(counts, _backward_recurrence(deltas, decays, cut))
    returns = advantages + v
    if whiten:
        advantages = _whitened(advantages, counts)
    if cu_seqlens is not None:
        return advantages.squeeze(0), returns.squeeze(0)
    return (advantages.mT, returns.mT) if time_major else (advantages, returns)


def _sequence_of(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The number of the sequence that each step belongs to, and so its row of `bootstrap`."""
    if cu_seqlens is None:
        return torch.arange(v.shape[0], device=v.device).unsqueeze(-1).expand_as(v)
    steps = torch.arange(v.shape[1], device=v.device)
    return (torch.searchsorted(cu_seqlens.long(), steps, right=True) - 1).unsqueeze(0)


def _next_step_that_counts(counts: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the next step that counts (0 if none), and whether a sequence has none."""
    length = counts.shape[-1]
    steps = torch.arange(length, device=counts.device).expand_as(counts)
    from_here = torch.where(counts, steps, length).flip(-1).cummin(-1).values.flip(-1)
    following = torch.cat([from_here[:, 1:], torch.full_like(from_here[:, :1], length)], dim=-1)
    none = following == length
    following = following.masked_fill(none, 0)
    return following, none | (sequence.gather(-1, following) != sequence)


def _backward_recurrence(deltas: Tensor, decays: Tensor, cut: Tensor) -> Tensor:
    """Returns a with a_t = deltas_t + decays_t * a_(t+1), along the last dimension.

    Where it is cut a_t = deltas_t: behind it lies another episode, which may hold anything.
    """
    carry = torch.zeros_like(deltas[:, 0]) if deltas.shape[-1] else None
    steps = []
    columns = (reversed(t.unbind(-1)) for t in (deltas, decays, cut))
    for delta, decay, ends in zip(*columns, strict=True):
        carry = torch.where(ends, delta, torch.addcmul(delta, decay, carry))
        steps.append(carry)
    return torch.stack(steps[::-1], dim=-1) if steps else deltas


def _whitened(advantages: Tensor, counts: Tensor) -> Tensor:
    count = counts.sum()
    centred = keep(counts, advantages - advantages.sum() / count.clamp(min=1))
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + WHITEN_EPSILON)


def group_advantages(
    rewards: Tensor, group_size: int, kind: str = "relative", *, eps: float = 1e-8
) -> Tensor:
    """Returns each reward relative to its group of G = `group_size` consecutive rows.

    | kind          | advantage                                             | source              |
    |---------------|-------------------------------------------------------|---------------------|
    | relative      | r - mean                                              | Liu 2025 (Dr. GRPO) |
    | normalized    | (r - mean) / (std + eps), unbiased std                | Shao 2024 (GRPO)    |
    | rank          | (rank - (G-1)/2) / (G/2), 0 the lowest, ties averaged |                     |
    | leave_one_out | r - mean of the others                                | Ahmadian 2024       |

    A group of one, and a group of equal rewards, give exactly 0.

    Args:
        rewards: `(N,)`, N a multiple of `group_size`; no gradient.
        group_size: G.
        kind: a row of the table.
        eps: added to the standard deviation.
    """
    r = rewards.detach().to(accumulate_dtype(rewards)).reshape(-1, group_size)
    if kind == "rank":
        others = r.unsqueeze(-2)
        below = (others < r.unsqueeze(-1)).sum(-1)
        equal = (others == r.unsqueeze(-1)).sum(-1) - 1
        rank = below.to(r.dtype) + 0.5 * equal
        return ((rank - (group_size - 1) / 2) / (group_size / 2)).reshape(-1)
    r = r - r[:, :1]  # equal rewards become exact zeros, whatever the rounding of their mean
    centred = r - r.mean(-1, keepdim=True)
    if kind == "normalized":
        variance = centred.square().sum(-1, keepdim=True) / max(group_size - 1, 1)
        centred = centred / (variance.sqrt() + eps)
    elif kind == "leave_one_out":
        centred = centred * (group_size / max(group_size - 1, 1))
    return centred.reshape(-1)
