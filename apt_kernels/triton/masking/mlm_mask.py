"""mlm_mask in Triton: 80/10/10 masking, the same bits as on the CPU."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

BLOCK = 1024  # slots a program takes at a time: 8 a thread at 4 warps
SECTOR = tl.constexpr(32)  # slots: whole sectors of memory, of a mask one
MOST_RUNS = 256  # of special ids: each costs every slot a few instructions
NO_KEY = tl.constexpr(2**63 - 1)
KEY_SHIFT = tl.constexpr(31)  # positions are below 2^31
POSITION = tl.constexpr(2**31 - 1)
ALWAYS = tl.constexpr(2**32)
IGNORED = tl.constexpr(-100)
KEEP_GENERIC = [
    "T", "mask_token_id", "word_count", "chosen_below", "mask_below", "random_below",
    "seed_low", "seed_high", "step",
]  # fmt: skip


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _mask_tile(
    inputs, outputs, options, row, first, T, sample, word_start, chosen_below, only_start,
    RUNS: tl.constexpr, BLOCK: tl.constexpr, KEYED: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """Writes one tile of a row.

    Returns whether a slot was chosen, the smallest key of an eligible slot (with KEYED), and the
    start of the word that the tile ends in. With RESCUE only the word at only_start is chosen.
    """
    input_ids_ptr, attention_mask_ptr, special_tokens_mask_ptr, word_ids_ptr = inputs
    masked_ids_ptr, labels_ptr, positions_ptr = outputs
    mask_token_id, word_count, mask_below, random_below, seed, step = options
    i = tl.arange(0, BLOCK)
    t = first + i
    live = (t >= 0) & (t < T)
    at = (row * T + first) + i  # one address a thread: t, of 32 bits, would make one a slot
    w0, w1, w2, _ = tl.philox(
        seed, t.to(tl.uint32), step, sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    )
    raw = tl.load(input_ids_ptr + at, mask=live, other=0)
    token = raw.to(tl.int64)
    eligible = live
    word = tl.umulhi(w2, word_count.to(tl.uint32)).to(tl.int64)
    for r in tl.static_range(0, len(RUNS), 2):
        eligible &= (token < RUNS[r]) | (token >= RUNS[r] + RUNS[r + 1])
        word += tl.where(word >= RUNS[r], RUNS[r + 1], 0)
    if attention_mask_ptr is not None:
        eligible &= tl.load(attention_mask_ptr + at, mask=live, other=0) != 0
    if special_tokens_mask_ptr is not None:
        eligible &= tl.load(special_tokens_mask_ptr + at, mask=live, other=1) == 0
    start = t
    if word_ids_ptr is not None:
        number = tl.load(word_ids_ptr + at, mask=live, other=0)
        previous = tl.load(word_ids_ptr + at - 1, mask=live & (t > 0), other=0)
        begins = (t == 0) | (number != previous)
        start = tl.associative_scan(tl.where(begins & live, t, word_start), 0, _larger)
        word_start = tl.max(start, 0)
        eligible &= number >= 0
        w0, _, _, _ = tl.philox(
            seed, start.to(tl.uint32), step, sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
        )
    draw = w0.to(tl.int64)
    chosen = eligible & (draw < chosen_below)
    if RESCUE:
        chosen &= start == only_start
    smallest = NO_KEY
    if KEYED:
        key = (draw << KEY_SHIFT) | start.to(tl.int64)
        smallest = tl.reduce(tl.where(eligible, key, NO_KEY), 0, _smaller)
    treatment = w1.to(tl.int64)
    replaced = tl.where(treatment < random_below, word, token)
    replaced = tl.where(treatment < mask_below, mask_token_id, replaced)
    tl.store(masked_ids_ptr + at, tl.where(chosen, replaced.to(raw.dtype), raw), mask=live)
    tl.store(labels_ptr + at, tl.where(chosen, raw, IGNORED), mask=live)
    tl.store(positions_ptr + at, chosen, mask=live)
    return tl.max(chosen.to(tl.int32), 0) > 0, smallest, word_start


# What: BERT's 80/10/10 masking from Philox4x32-10 of (seed, step, sample, slot).
# Passes: one over the ids; one more over a row that at_least_one finds without a chosen slot.
# Bytes of int64 ids: 8 read and 17 written a slot, and the masks. Philox: 10 rounds a slot, twice
# with word_ids. Parallelism: one program a tile of a row; with word_ids or at_least_one, a row.
# Tiles are cut at multiples of SECTOR slots of the whole tensor, where that takes no more of them.
@triton.jit(do_not_specialize=KEEP_GENERIC)
def _mlm_mask_fwd_kernel(
    input_ids_ptr, attention_mask_ptr, special_tokens_mask_ptr, sample_ids_ptr, word_ids_ptr,
    masked_ids_ptr, labels_ptr, positions_ptr, T: tl.int32,
    mask_token_id: tl.int64, word_count: tl.int64,
    chosen_below: tl.int64, mask_below: tl.int64, random_below: tl.int64,
    seed_low: tl.int64, seed_high: tl.int64, step: tl.int64,
    RUNS: tl.constexpr, BLOCK: tl.constexpr, AT_LEAST_ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if sample_ids_ptr is not None:
        sample = tl.load(sample_ids_ptr + row)
    inputs = input_ids_ptr, attention_mask_ptr, special_tokens_mask_ptr, word_ids_ptr
    outputs = masked_ids_ptr, labels_ptr, positions_ptr
    seed = (seed_high << 32) | seed_low
    options = mask_token_id, word_count, mask_below, random_below, seed, step.to(tl.uint32)
    found, smallest = tl.full((), False, tl.int1), tl.full((), NO_KEY, tl.int64)
    word_start = tl.full((), -1, tl.int32)
    head = (row * T % SECTOR).to(tl.int32)  # slots between the cut and the row
    head = tl.where((T - 1) % BLOCK + head < BLOCK, head, 0)
    for first in range(tl.program_id(1) * BLOCK - head, T, tl.num_programs(1) * BLOCK):
        some, key, word_start = _mask_tile(
            inputs, outputs, options, row, first, T, sample, word_start, chosen_below, -1,
            RUNS=RUNS, BLOCK=BLOCK, KEYED=AT_LEAST_ONE, RESCUE=False,
        )  # fmt: skip
        if AT_LEAST_ONE:
            found |= some
            smallest = tl.minimum(smallest, key)
    if AT_LEAST_ONE and (not found) & (smallest != NO_KEY):
        only_start = (smallest & POSITION).to(tl.int32)
        word_start = tl.full((), -1, tl.int32)
        tl.debug_barrier()  # the first pass has written the row before the second one does
        for first in range(-head, T, BLOCK):
            _, _, word_start = _mask_tile(
                inputs, outputs, options, row, first, T, sample, word_start, ALWAYS, only_start,
                RUNS=RUNS, BLOCK=BLOCK, KEYED=False, RESCUE=True,
            )  # fmt: skip


def mlm_mask_fwd(
    input_ids, attention_mask, special_tokens_mask, sample_ids, word_ids, special_runs,
    mask_token_id, word_count, chosen_below, mask_below, random_below, seed_low, seed_high, step,
    at_least_one,
):  # fmt: skip
    """(masked_ids, labels, mask_positions), (B,T) each."""
    B, T = input_ids.shape
    if len(special_runs) > 2 * MOST_RUNS:
        raise ValueError(
            f"special_token_ids: expected at most {MOST_RUNS} runs of consecutive ids on a GPU, "
            f"got {len(special_runs) // 2}"
        )
    masked_ids, labels = torch.empty_like(input_ids), torch.empty_like(input_ids)
    positions = torch.empty_like(input_ids, dtype=torch.bool)
    if B == 0 or T == 0:
        return masked_ids, labels, positions
    block = min(BLOCK, triton.next_power_of_2(T))
    in_order = word_ids is not None or at_least_one
    with rows.device_of(input_ids):
        _mlm_mask_fwd_kernel[(B, 1 if in_order else min(triton.cdiv(T, block), 65535))](
            input_ids, attention_mask, special_tokens_mask, sample_ids, word_ids,
            masked_ids, labels, positions, T,
            mask_token_id, word_count, chosen_below, mask_below, random_below,
            seed_low, seed_high, step,
            RUNS=tuple(special_runs), BLOCK=block, AT_LEAST_ONE=at_least_one,
            num_warps=4 if block > 128 else 1,
        )  # fmt: skip
    return masked_ids, labels, positions
