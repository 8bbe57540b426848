"""group_advantages in Triton: one program takes one group."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows

BLOCK = 256  # rewards at a time, and the side of the square in which ranks are compared: 64 KiB

RELATIVE = tl.constexpr(0)
NORMALIZED = tl.constexpr(1)
RANK = tl.constexpr(2)
LEAVE_ONE_OUT = tl.constexpr(3)


@triton.jit
def _ranks(rewards_ptr, x, G, WIDTH: tl.constexpr):
    """How many rewards of the group each x beats, ties with others as a half."""
    rank = tl.zeros_like(x) - 0.5  # x equals itself
    for start in range(0, G, WIDTH):
        j = start + tl.arange(0, WIDTH)
        other = tl.load(rewards_ptr + j, mask=j < G, other=float("inf")).to(tl.float32)
        inside = (j < G)[None, :]
        below = (other[None, :] < x[:, None]) & inside
        equal = (other[None, :] == x[:, None]) & inside
        rank += tl.sum(below.to(tl.float32) + 0.5 * equal.to(tl.float32), 1)
    return rank


# What: the advantage of each reward of a group. Passes: three, two of them from the cache.
# Bytes: 4 a reward read and written. Parallelism: a group a program.
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
        if KIND == NORMALIZED:
            centred = centred / deviation
        elif KIND == LEAVE_ONE_OUT:
            centred = centred * (size / others)
        elif KIND == RANK:
            centred = (_ranks(rewards_ptr, reward, G, WIDTH) - 0.5 * (size - 1.0)) / (0.5 * size)
        tl.store(out_ptr + k, centred, mask=k < G)


def group_advantages_fwd(rewards, group_size, kind, eps):
    """Advantages (N,), float32."""
    out = rewards.new_empty(rewards.shape, dtype=torch.float32)
    if rewards.shape[0] == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(group_size))
    with rows.device_of(rewards):
        _group_advantages_fwd_kernel[(rewards.shape[0] // group_size,)](
            rewards, out, group_size, eps,
            KIND=kind, BLOCK=block, WIDTH=min(block, 32), num_warps=max(1, block // 64),
        )  # fmt: skip
    return out
