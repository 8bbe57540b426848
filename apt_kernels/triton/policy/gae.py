"""gae in Triton: an associative scan over the steps of a tile of rows."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

WHITEN_BLOCK = 4096  # advantages a program takes: 16 a thread at 8 warps
OF_A_WARP = 128  # steps: 4 a thread, 16 bytes of float32; of several rows where they are short
OF_A_WARP_SINGLY = 256  # where steps are loaded one by one: ptxas gives 8 warps too few registers
WHITEN_PROGRAMS = 1024  # partial sums that every program of the next step adds, at most


@triton.jit
def _advantage(delta, decay, later):
    """delta + decay later. A decay of 0 cuts: what lies behind may be anything."""
    return tl.where(decay == 0, delta, delta + decay * later)


@triton.jit
def _then(delta_later, decay_later, delta, decay):
    """The map x -> delta + decay x after that of the later steps."""
    return _advantage(delta, decay, delta_later), decay * decay_later


@triton.jit
def _first_two(value_later, second_later, number_later, value, second, number):
    """The values of the first two steps that count, and how many of the two there are."""
    second = tl.where(number > 1, second, tl.where(number > 0, value_later, second_later))
    value = tl.where(number > 0, value, value_later)
    return value, second, tl.minimum(number + number_later, 2)


@triton.jit
def _offset(row, t, place, stride_b, stride_t, WINDOWS: tl.constexpr):
    if WINDOWS:
        offset = place
    else:
        offset = row * stride_b + t * stride_t
    return offset


@triton.jit
def _load(ptr, offset, live, vectors, rest, WINDOWS: tl.constexpr):
    """Windows: whole vectors, of other rows too; and one by one what the tensor ends with."""
    if WINDOWS:
        x = tl.load(ptr + offset, mask=vectors, other=0)
        if rest:
            x = tl.where(vectors, x, tl.load(ptr + offset, mask=live & ~vectors, other=0))
    else:
        x = tl.load(ptr + offset, mask=live, other=0)
    return x


@triton.jit
def _flags(ptr, offset, live, vectors, rest, ABSENT: tl.constexpr, WINDOWS: tl.constexpr):
    # one return: after an early one the compiler still meets the load of None
    if ptr is None:
        flags = live & ABSENT
    else:
        flags = live & (_load(ptr, offset, live, vectors, rest, WINDOWS) != 0)
    return flags


@triton.jit
def _store(ptr, offset, x, live, inner, edge, WINDOWS: tl.constexpr):
    """Windows: `inner` vectors lie in the row, the `edge` of it is stored one by one."""
    if WINDOWS:
        tl.store(ptr + offset, x, mask=inner)
        tl.store(ptr + offset, x, mask=edge)
    else:
        tl.store(ptr + offset, x, mask=live)


# What: A_t = delta_t + gamma lambda A_(t+1) of BLOCK_B rows, from the last step back.
# Passes: one. Bytes: rewards, values and flags read, advantages and returns written. Parallelism: a
# tile of rows a program, scans of BLOCK_T steps at a time. Accuracy: float32.
@triton.jit(do_not_specialize=["B", "T"])
def _gae_fwd_kernel(
    rewards_ptr, values_ptr, mask_ptr, terminated_ptr, truncated_ptr, bootstrap_ptr, cu_seqlens_ptr,
    advantages_ptr, returns_ptr, B: tl.int64, T: tl.int64,
    rewards_b: tl.int64, rewards_t: tl.int64, values_b: tl.int64, values_t: tl.int64,
    mask_b: tl.int64, mask_t: tl.int64, terminated_b: tl.int64, terminated_t: tl.int64,
    truncated_b: tl.int64, truncated_t: tl.int64, bootstrap_b: tl.int64, bootstrap_t: tl.int64,
    out_b: tl.int64, out_t: tl.int64, gamma: tl.float32, decay: tl.float32,
    PER_STEP: tl.constexpr, VECTORS: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = sequence[:, None]
    place = tl.arange(0, BLOCK_T)[None, :]
    inside = row < B
    first = T * 0
    steps = T
    if VECTORS:  # tells the compiler that no vector of 16 bytes lies across the end of a row
        steps = T // 16 * 16
    if cu_seqlens_ptr is not None:  # BLOCK_B is 1; offsets outside the tensors are cut
        number = tl.program_id(0).to(tl.int64)
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + number), 0), T)
        steps = tl.minimum(tl.load(cu_seqlens_ptr + number + 1), T) - first
        row = row * 0
    # Windows: tensors without gaps are cut at multiples of 16 elements, wherever the rows begin.
    sixteens = (row * T + first) // 16
    head = row * T + first - sixteens * 16
    end = head + steps
    N = T if cu_seqlens_ptr is not None else B * T
    windows = tl.cdiv(steps + 15 if WINDOWS else steps, BLOCK_T)
    after_last = tl.zeros((BLOCK_B, 1), tl.float32)
    if bootstrap_ptr is not None:
        if not PER_STEP:
            at = bootstrap_ptr + sequence * bootstrap_b
            after_last = tl.load(at, mask=sequence < B, other=0.0).to(tl.float32)[:, None]
    trace = tl.zeros((BLOCK_B, 1), tl.float32)  # the advantage, the value of the next step
    carried = tl.zeros((BLOCK_B, 1), tl.float32)
    seen = tl.zeros((BLOCK_B, 1), tl.int32)  # whether there is one
    for tile in range(0, windows):
        start = (windows - 1 - tile) * BLOCK_T
        step = start + place
        t = first + step
        flat = sixteens * 16 + step
        live = inside & (step < steps)
        vectors = live
        inner = live
        rest = False
        edge = live
        if WINDOWS:
            live = inside & (step >= head) & (step < end)
            vectors = inside & (step < tl.minimum(N // 16 - sixteens, (end + 15) // 16) * 16)
            inner = inside & (step >= (head + 15) // 16 * 16) & (step < end // 16 * 16)
            rest = tl.max(sixteens) * 16 + start + BLOCK_T > N // 16 * 16
            edge = live & ~inner
        place_of_mask = _offset(row, t, flat, mask_b, mask_t, WINDOWS)
        counts = _flags(mask_ptr, place_of_mask, live, vectors, rest, True, WINDOWS)
        place_of_end = _offset(row, t, flat, terminated_b, terminated_t, WINDOWS)
        ends = _flags(terminated_ptr, place_of_end, live, vectors, rest, False, WINDOWS)
        place_of_break = _offset(row, t, flat, truncated_b, truncated_t, WINDOWS)
        breaks = _flags(truncated_ptr, place_of_break, live, vectors, rest, False, WINDOWS)
        # loaded wherever there is a step, for a mask from memory would part the vectors
        place_of_reward = _offset(row, t, flat, rewards_b, rewards_t, WINDOWS)
        reward = _load(rewards_ptr, place_of_reward, live, vectors, rest, WINDOWS)
        place_of_value = _offset(row, t, flat, values_b, values_t, WINDOWS)
        value = _load(values_ptr, place_of_value, live, vectors, rest, WINDOWS)
        reward = tl.where(counts, reward.to(tl.float32), 0.0)
        value = tl.where(counts, value.to(tl.float32), 0.0)
        # the first step from here on that counts, and the one after it
        nearest, following, found = tl.associative_scan(
            (value, value * 0.0, counts.to(tl.int32)), 1, _first_two, reverse=True
        )
        last = (found < 2) & (seen == 0)
        following = tl.where(found > 1, following, carried)
        after = tl.where(last, after_last, 0.0)
        if bootstrap_ptr is not None:
            if PER_STEP:
                of_step = _offset(row, t, flat, bootstrap_b, bootstrap_t, WINDOWS)
                after = _load(bootstrap_ptr, of_step, live, vectors, rest, WINDOWS).to(tl.float32)
        following = tl.where(ends, 0.0, tl.where(breaks | last, after, following))
        delta = tl.where(counts, reward + gamma * following - value, 0.0)
        kept = tl.where(counts, tl.where(ends | breaks | last, 0.0, decay), 1.0)
        delta, kept = tl.associative_scan((delta, kept), 1, _then, reverse=True)
        advantage = _advantage(delta, kept, trace)
        out = _offset(row, t, flat, out_b, out_t, WINDOWS)
        kept_advantage = tl.where(counts, advantage, 0.0)
        _store(advantages_ptr, out, kept_advantage, live, inner, edge, WINDOWS)
        target = tl.where(counts, advantage + value, 0.0)
        _store(returns_ptr, out, target, live, inner, edge, WINDOWS)
        here = place == 0
        trace = tl.sum(tl.where(here, advantage, 0.0), 1, keep_dims=True)
        nearest = tl.where(found > 0, nearest, carried)
        carried = tl.sum(tl.where(here, nearest, 0.0), 1, keep_dims=True)
        seen = seen | tl.sum(tl.where(here, found, 0), 1, keep_dims=True)


# What: the sum of the advantages of a block, and how many count.
# Passes: one. Bytes: 5 a step. Parallelism: a block a program. Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["N"])
def _sum_kernel(advantages_ptr, mask_ptr, sums_ptr, counts_ptr, N: tl.int64, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts = _flags(mask_ptr, i, i < N, i < N, False, True, False)
        total += tl.load(advantages_ptr + i, mask=counts, other=0.0)
        count += counts.to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count, 0))


@triton.jit
def _total(ptr, P, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(ptr + i, mask=i < P, other=0), 0)


# What: the sum of the squares of a block of advantages around the mean of all.
# Passes, bytes, parallelism: as above; every program adds the partial sums of all itself.
@triton.jit(do_not_specialize=["N", "P"])
def _squares_kernel(
    advantages_ptr, mask_ptr, sums_ptr, counts_ptr, squares_ptr, N: tl.int64, P: tl.int32,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    count = tl.maximum(_total(counts_ptr, P, PROGRAMS), 1).to(tl.float32)
    mean = _total(sums_ptr, P, PROGRAMS) / count
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts = _flags(mask_ptr, i, i < N, i < N, False, True, False)
        x = tl.load(advantages_ptr + i, mask=counts, other=0.0) - mean
        total += tl.where(counts, x * x, 0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(total, 0))


# What: the advantages that count brought to mean 0 and variance 1, in place.
@triton.jit(do_not_specialize=["N", "P"])
def _whiten_kernel(
    advantages_ptr, mask_ptr, sums_ptr, counts_ptr, squares_ptr, N: tl.int64, P: tl.int32,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    count = _total(counts_ptr, P, PROGRAMS)
    mean = _total(sums_ptr, P, PROGRAMS) / tl.maximum(count, 1).to(tl.float32)
    variance = _total(squares_ptr, P, PROGRAMS) / tl.maximum(count - 1, 1).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(variance + 1e-8)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts = _flags(mask_ptr, i, i < N, i < N, False, True, False)
        x = tl.load(advantages_ptr + i, mask=counts, other=0.0)
        tl.store(advantages_ptr + i, tl.where(counts, (x - mean) * scale, 0.0), mask=i < N)


def _strides(t, time_major):
    """Elements from row to row and from step to step; of one dimension, from one to the next."""
    if t is None:
        return 0, 0
    if t.dim() == 1:
        return t.stride(0), t.stride(0)
    return (t.stride(1), t.stride(0)) if time_major else (t.stride(0), t.stride(1))


def _whiten(advantages, mask):
    N = advantages.numel()
    P = min(triton.cdiv(N, WHITEN_BLOCK), WHITEN_PROGRAMS)
    sums, squares = advantages.new_empty(P), advantages.new_empty(P)
    counts = advantages.new_empty(P, dtype=torch.int32)
    mask = None if mask is None else mask.contiguous()
    sizes = {"BLOCK": WHITEN_BLOCK, "num_warps": 8}
    arguments = (advantages, mask, sums, counts, squares, N, P)
    _sum_kernel[(P,)](advantages, mask, sums, counts, N, **sizes)
    _squares_kernel[(P,)](*arguments, PROGRAMS=WHITEN_PROGRAMS, **sizes)
    _whiten_kernel[(P,)](*arguments, PROGRAMS=WHITEN_PROGRAMS, **sizes)


def gae_fwd(
    rewards, values, mask, terminated, truncated, bootstrap, cu_seqlens, gamma, gae_lambda, whiten,
    time_major,
):  # fmt: skip
    """(advantages, returns) in the shape of rewards, float32 and contiguous."""
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    if cu_seqlens is None:
        B, T = rewards.shape[::-1] if time_major else rewards.shape
        per_step = bootstrap is not None and bootstrap.dim() == 2
    else:
        B, T = cu_seqlens.shape[0] - 1, rewards.shape[0]
        per_step = bootstrap is not None and bootstrap.shape[0] != B
    vectors = cu_seqlens is None and not time_major and T % 16 == 0
    inputs = (rewards, values, mask, terminated, truncated, bootstrap)
    per_token = [t for t in inputs if t is not None and t.shape == rewards.shape]
    windows = not time_major and not vectors and all(t.is_contiguous() for t in per_token)
    if time_major:  # rows are adjacent: many of them, and few steps at a time
        block_b, block_t, warps = 64, 8, 2
    else:
        of_a_warp = OF_A_WARP if vectors or windows else OF_A_WARP_SINGLY
        block_t = min(1024, triton.next_power_of_2(T + 15 if windows else T))
        block_b = max(1, of_a_warp // block_t) if cu_seqlens is None else 1
        warps = max(1, block_t // of_a_warp)
    with rows.device_of(rewards):
        _gae_fwd_kernel[(triton.cdiv(B, block_b),)](
            *inputs, cu_seqlens, advantages, returns, B, T,
            *(stride for t in (*inputs, advantages) for stride in _strides(t, time_major)),
            gamma, gamma * gae_lambda, PER_STEP=per_step, VECTORS=vectors,
            WINDOWS=windows, BLOCK_B=block_b, BLOCK_T=block_t, num_warps=warps,
        )  # fmt: skip
        if whiten:
            _whiten(advantages, mask)
    return advantages, returns
