"""group_advantages in Triton: a program takes several whole groups, or a large group in blocks."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

WHOLE = 1024  # the largest group that a program keeps in registers
WHOLE_RANKED = 64  # of ranks: each reward of the group costs the others a comparison and a sum
ELEMENTS = 512  # of the groups of a program together
OF_A_WARP = 128  # rewards: 4 a thread, so that the advantages are stored 16 bytes at a time
BLOCK = 256  # rewards of a large group at a time

NORMALIZED = tl.constexpr(1)
RANK = tl.constexpr(2)
LEAVE_ONE_OUT = tl.constexpr(3)  # and 0, relative, which needs no case


@triton.jit
def _ranks(rewards_ptr, x, G, WIDTH: tl.constexpr):
    """How many rewards of the group each x is above; an equal one counts a half."""
    rank = tl.zeros_like(x) - 0.5  # x equals itself
    for start in range(0, G, WIDTH):
        j = start + tl.arange(0, WIDTH)
        other = tl.load(rewards_ptr + j, mask=j < G, other=float("inf")).to(tl.float32)
        inside = (j < G)[None, :]
        below = (other[None, :] < x[:, None]) & inside
        equal = (other[None, :] == x[:, None]) & inside
        rank += tl.sum(below.to(tl.float32) + 0.5 * equal.to(tl.float32), 1)
    return rank


@triton.jit
def _scaled(centred, deviation, size, others, KIND: tl.constexpr):
    if KIND == NORMALIZED:
        centred = centred / deviation
    elif KIND == LEAVE_ONE_OUT:
        centred = centred * (size / others)
    return centred


# What: the advantage of each reward of groups of at most BLOCK. Passes: one.
# Bytes: each reward read and 4 written. Parallelism: GROUPS groups a program.
# Accuracy: float32; exactly 0 in a group of equal rewards.
@triton.jit(do_not_specialize=["N", "G"])
def _whole_groups_kernel(
    rewards_ptr, out_ptr, N: tl.int64, G: tl.int64, eps: tl.float32,
    KIND: tl.constexpr, FULL: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if FULL:  # groups follow each other without gaps: 16 bytes a thread
        G = tl.full((), BLOCK, tl.int64)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, BLOCK)[None, :]
    inside = i < G
    live = (group < N)[:, None]
    if not FULL:
        live = live & inside
    at = group[:, None] * G + i
    x = tl.load(rewards_ptr + at, mask=live, other=0.0).to(tl.float32)
    size = G.to(tl.float32)
    others = tl.maximum(G - 1, 1).to(tl.float32)
    if KIND == RANK:
        rank = tl.zeros_like(x) - 0.5  # x equals itself
        for j in range(0, G):
            other = tl.sum(tl.where(i == j, x, 0.0), 1, keep_dims=True)
            equal = (other == x).to(tl.float32)
            rank += (other < x).to(tl.float32) + 0.5 * equal
        advantage = (rank - 0.5 * (size - 1.0)) / (0.5 * size)
    else:
        first = tl.sum(tl.where(i == 0, x, 0.0), 1, keep_dims=True)
        centred = tl.where(inside, x - first, 0.0)
        centred = tl.where(inside, centred - tl.sum(centred, 1, keep_dims=True) / size, 0.0)
        variance = tl.sum(centred * centred, 1, keep_dims=True) / others
        advantage = _scaled(centred, tl.sqrt_rn(variance) + eps, size, others, KIND)
    tl.store(out_ptr + at, advantage, mask=live)


# What: the advantage of each reward of a large group. Passes: three, two of them from the cache;
# ranks: one more a block. Bytes: each reward read and 4 written. Parallelism: a group a program.
# Accuracy: float32; exactly 0 in a group of equal rewards.
@triton.jit(do_not_specialize=["G"])
def _group_advantages_fwd_kernel(
    rewards_ptr, out_ptr, G: tl.int64, eps: tl.float32,
    KIND: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rewards_ptr += group * G
    out_ptr += group * G
    size = G.to(tl.float32)
    others = tl.maximum(G - 1, 1).to(tl.float32)
    first = tl.load(rewards_ptr).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    if KIND != RANK:
        for start in range(0, G, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(rewards_ptr + i, mask=i < G, other=0.0).to(tl.float32)
            total += tl.where(i < G, x - first, 0.0)
    mean = tl.sum(total, 0) / size
    if KIND == NORMALIZED:
        for begin in range(0, G, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            y = tl.load(rewards_ptr + place, mask=place < G, other=0.0).to(tl.float32)
            y = tl.where(place < G, (y - first) - mean, 0.0)
            squares += y * y
    deviation = tl.sqrt_rn(tl.sum(squares, 0) / others) + eps
    for at in range(0, G, BLOCK):
        k = at + tl.arange(0, BLOCK)
        reward = tl.load(rewards_ptr + k, mask=k < G, other=0.0).to(tl.float32)
        centred = (reward - first) - mean
        centred = _scaled(centred, deviation, size, others, KIND)
        if KIND == RANK:
            centred = (_ranks(rewards_ptr, reward, G, WIDTH) - 0.5 * (size - 1.0)) / (0.5 * size)
        tl.store(out_ptr + k, centred, mask=k < G)


def group_advantages_fwd(rewards, group_size, kind, eps):
    """Advantages (N,), float32."""
    out = rewards.new_empty(rewards.shape, dtype=torch.float32)
    if rewards.shape[0] == 0:
        return out
    groups = rewards.shape[0] // group_size
    block = triton.next_power_of_2(group_size)
    with rows.device_of(rewards):
        if block <= (WHOLE_RANKED if kind == RANK.value else WHOLE):
            taken = max(1, ELEMENTS // block)
            _whole_groups_kernel[(triton.cdiv(groups, taken),)](
                rewards, out, groups, group_size, eps,
                KIND=kind, FULL=block == group_size, GROUPS=taken, BLOCK=block,
                num_warps=taken * block // OF_A_WARP,
            )  # fmt: skip
        else:
            block = min(BLOCK, block)
            _group_advantages_fwd_kernel[(groups,)](
                rewards, out, group_size, eps,
                KIND=kind, BLOCK=block, WIDTH=min(block, 32), num_warps=block // 64,
            )  # fmt: skip
    return out
