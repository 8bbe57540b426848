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
    """The map x -> delta + decay x, applied after the map of the later steps."""
    return _advantage(delta, decay, delta_later), decay * decay_later


@triton.jit
def _first_two(value_later, second_later, number_later, value, second, number):
    """The values of the first two steps that count, and how many of the two there are."""
    second = tl.where(number > 1, second, tl.where(number > 0, value_later, second_later))
    value = tl.where(number > 0, value, value_later)
    return value, second, tl.minimum(number + number_later, 2)


@triton.jit
def _rows(cu_seqlens_ptr, B, T, VECTORS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The rows of a program: (sequence [BLOCK_B], row [BLOCK_B, 1], first step, steps, all steps).

    With cu_seqlens a program has one sequence, and the tensors have one row. Offsets that lie
    outside the tensors are cut.
    """
    sequence = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = sequence[:, None]
    first = T * 0
    steps = T
    N = B * T
    if VECTORS:  # tells the compiler that no vector of 16 bytes lies across the end of a row
        steps = T // 16 * 16
    if cu_seqlens_ptr is not None:
        number = tl.program_id(0).to(tl.int64)
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + number), 0), T)
        steps = tl.minimum(tl.load(cu_seqlens_ptr + number + 1), T) - first
        row = row * 0
        N = T
    return sequence, row, first, steps, N


@triton.jit
def _tile(row, first, steps, B, T, N, start, WINDOWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The steps of a tile: (row, t, place, live, vectors, rest, inner, edge).

    t is the step in the row. WINDOWS: tensors without gaps are cut at multiples of 16 elements,
    wherever the rows begin. Then `place` is the element of the tensor, and whole `vectors` are
    loaded, of other rows too. `rest` says whether some `live` steps lie behind the last vector of
    the tensor. Stored are the vectors `inner` to the row, and its `edge` one by one.
    """
    step = start + tl.arange(0, BLOCK_T)[None, :]
    inside = row < B
    live = inside & (step < steps)
    vectors = live
    inner = live
    edge = live
    rest = False
    sixteens = (row * T + first) // 16
    if WINDOWS:
        head = row * T + first - sixteens * 16
        end = head + steps
        live = inside & (step >= head) & (step < end)
        vectors = inside & (step < tl.minimum(N // 16 - sixteens, (end + 15) // 16) * 16)
        inner = inside & (step >= (head + 15) // 16 * 16) & (step < end // 16 * 16)
        edge = live & ~inner
        rest = tl.max(sixteens) * 16 + start + BLOCK_T > N // 16 * 16
    return row, first + step, sixteens * 16 + step, live, vectors, rest, inner, edge


@triton.jit
def _load(ptr, stride_b, stride_t, tile, WINDOWS: tl.constexpr):
    """A number of each step of a tile, loaded wherever there is a step.

    A load under a mask that comes from memory would not be vectorised.
    """
    row, t, place, live, vectors, rest, _, _ = tile
    if WINDOWS:
        x = tl.load(ptr + place, mask=vectors, other=0)
        if rest:
            x = tl.where(vectors, x, tl.load(ptr + place, mask=live & ~vectors, other=0))
    else:
        x = tl.load(ptr + (row * stride_b + t * stride_t), mask=live, other=0)
    return x


@triton.jit
def _flags(ptr, stride_b, stride_t, tile, ABSENT: tl.constexpr, WINDOWS: tl.constexpr):
    """The flags of the steps of a tile; ABSENT for all steps where there is no tensor."""
    # one return: after an early one the compiler still meets the load of None
    live = tile[3]
    if ptr is None:
        flags = live & ABSENT
    else:
        flags = live & (_load(ptr, stride_b, stride_t, tile, WINDOWS) != 0)
    return flags


@triton.jit
def _store(ptr, stride_b, stride_t, tile, x, WINDOWS: tl.constexpr):
    row, t, place, live, _, _, inner, edge = tile
    if WINDOWS:
        tl.store(ptr + place, x, mask=inner)
        tl.store(ptr + place, x, mask=edge)
    else:
        tl.store(ptr + (row * stride_b + t * stride_t), x, mask=live)


# What: A_t = delta_t + gamma lambda A_(t+1) of BLOCK_B rows, from the last step back.
# Passes: one. Bytes: rewards, values and flags read, advantages and returns written. Parallelism: a
# tile of rows a program, scans of BLOCK_T steps at a time. Accuracy: float32.
@triton.jit(do_not_specialize=["B", "T"])
def _gae_fwd_kernel(
    inputs, outputs, strides, B: tl.int64, T: tl.int64, gamma: tl.float32, decay: tl.float32,
    PER_STEP: tl.constexpr, VECTORS: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    (rewards_ptr, values_ptr, mask_ptr, terminated_ptr, truncated_ptr, bootstrap_ptr,
     cu_seqlens_ptr) = inputs  # fmt: skip
    advantages_ptr, returns_ptr = outputs
    (rewards_b, rewards_t, values_b, values_t, mask_b, mask_t, terminated_b, terminated_t,
     truncated_b, truncated_t, bootstrap_b, bootstrap_t, out_b, out_t) = strides  # fmt: skip
    sequence, row, first, steps, N = _rows(cu_seqlens_ptr, B, T, VECTORS, BLOCK_B)
    windows = tl.cdiv(steps + 15 if WINDOWS else steps, BLOCK_T)
    after_last = tl.zeros((BLOCK_B, 1), tl.float32)
    if bootstrap_ptr is not None:
        if not PER_STEP:
            at = bootstrap_ptr + sequence * bootstrap_b
            after_last = tl.load(at, mask=sequence < B, other=0.0).to(tl.float32)[:, None]
    trace = tl.zeros((BLOCK_B, 1), tl.float32)  # the advantage, the value of the next step
    carried = tl.zeros((BLOCK_B, 1), tl.float32)
    seen = tl.zeros((BLOCK_B, 1), tl.int32)  # whether there is one
    for number in range(0, windows):
        start = (windows - 1 - number) * BLOCK_T
        tile = _tile(row, first, steps, B, T, N, start, WINDOWS, BLOCK_T)
        counts = _flags(mask_ptr, mask_b, mask_t, tile, True, WINDOWS)
        ends = _flags(terminated_ptr, terminated_b, terminated_t, tile, False, WINDOWS)
        breaks = _flags(truncated_ptr, truncated_b, truncated_t, tile, False, WINDOWS)
        reward = _load(rewards_ptr, rewards_b, rewards_t, tile, WINDOWS)
        value = _load(values_ptr, values_b, values_t, tile, WINDOWS)
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
                after = _load(bootstrap_ptr, bootstrap_b, bootstrap_t, tile, WINDOWS)
                after = after.to(tl.float32)
        following = tl.where(ends, 0.0, tl.where(breaks | last, after, following))
        delta = tl.where(counts, reward + gamma * following - value, 0.0)
        kept = tl.where(counts, tl.where(ends | breaks | last, 0.0, decay), 1.0)
        delta, kept = tl.associative_scan((delta, kept), 1, _then, reverse=True)
        advantage = _advantage(delta, kept, trace)
        kept_advantage = tl.where(counts, advantage, 0.0)
        _store(advantages_ptr, out_b, out_t, tile, kept_advantage, WINDOWS)
        target = tl.where(counts, advantage + value, 0.0)
        _store(returns_ptr, out_b, out_t, tile, target, WINDOWS)
        here = tl.arange(0, BLOCK_T)[None, :] == 0
        trace = tl.sum(tl.where(here, advantage, 0.0), 1, keep_dims=True)
        nearest = tl.where(found > 0, nearest, carried)
        carried = tl.sum(tl.where(here, nearest, 0.0), 1, keep_dims=True)
        seen = seen | tl.sum(tl.where(here, found, 0), 1, keep_dims=True)


@triton.jit
def _counted(mask_ptr, i, N):
    """Which of the elements i of a tensor without gaps count."""
    if mask_ptr is None:
        counts = i < N
    else:
        counts = tl.load(mask_ptr + i, mask=i < N, other=0) != 0
    return counts


# What: the sum of the advantages of a block, and how many count.
# Passes: one. Bytes: 5 a step. Parallelism: a block a program. Accuracy: float32, fixed order.
@triton.jit(do_not_specialize=["N"])
def _sum_kernel(advantages_ptr, mask_ptr, sums_ptr, counts_ptr, N: tl.int64, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts = _counted(mask_ptr, i, N)
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
        counts = _counted(mask_ptr, i, N)
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
        counts = _counted(mask_ptr, i, N)
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
            (*inputs, cu_seqlens), (advantages, returns),
            tuple(n for t in (*inputs, advantages) for n in _strides(t, time_major)),
            B, T, gamma, gamma * gae_lambda, PER_STEP=per_step, VECTORS=vectors,
            WINDOWS=windows, BLOCK_B=block_b, BLOCK_T=block_t, num_warps=warps,
        )  # fmt: skip
        if whiten:
            _whiten(advantages, mask)
    return advantages, returns
