"""ema_update_ in Triton: a few dozen tensors a launch."""

import functools

import torch
import triton
import triton.language as tl

from apt_kernels.triton import rows

CHUNK = 2048  # elements at a time: 16 a thread, eight 16-byte loads in flight
BLOCK = 4 * CHUNK  # elements of a program, beside which its look into the table counts for little
TENSORS = 32  # a launch; their addresses travel as arguments, so that the host copies no table
NEVER = 2**31 - 1  # the first block of a tensor that is not there


@triton.jit
def _update(target_ptr, source_ptr, live, weight):
    """One block; all of it where live is None."""
    target, source = tl.load(target_ptr, mask=live), tl.load(source_ptr, mask=live)
    if target.dtype == tl.float64:
        result = target + tl.full((), weight, tl.float64) * (source.to(tl.float64) - target)
    else:
        x = target.to(tl.float32)
        result = x + tl.full((), weight, tl.float32) * (source.to(tl.float32) - x)
    tl.store(target_ptr, result.to(target.dtype), mask=live)


# What: target += weight (source - target) over up to TENSORS tensors.
# Passes: one, in place. Bytes: an element of both read, one written, 16 a load where tensors begin
# so (ALIGNED). Parallelism: one program a block of a tensor, found by comparing with the tensors'
# first blocks. Accuracy: float32, one rounding to the target's dtype; float64 targets in float64.
@triton.jit
def _ema_update_fwd_kernel(
    targets, sources, first_blocks_ptr, counts_ptr, weight: tl.float64,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first_blocks = tl.load(first_blocks_ptr + tl.arange(0, TENSORS))
    begun = first_blocks <= block
    which = tl.sum(begun.to(tl.int32), 0) - 1
    count = tl.load(counts_ptr + which)
    first = (block - tl.max(tl.where(begun, first_blocks, 0), 0)).to(tl.int64) * BLOCK
    target_ptr, source_ptr = targets[0], sources[0]
    for i in tl.static_range(1, TENSORS):
        target_ptr = tl.where(which == i, targets[i], target_ptr)
        source_ptr = tl.where(which == i, sources[i], source_ptr)
    if ALIGNED:
        target_ptr, source_ptr = tl.multiple_of(target_ptr, 16), tl.multiple_of(source_ptr, 16)
    for start in range(0, BLOCK, CHUNK):
        at = first + start + tl.arange(0, CHUNK)
        if first + start + CHUNK <= count:
            _update(target_ptr + at, source_ptr + at, None, weight)
        else:
            _update(target_ptr + at, source_ptr + at, at < count, weight)


@functools.lru_cache(maxsize=1024)  # a model's sizes stay: only its first update makes tables
def _table(counts, tensors, device):
    """The first block of every tensor of a launch, the numbers of elements, and all blocks."""
    first_blocks, blocks = [], 0
    for count in counts:
        first_blocks.append(blocks)
        blocks += triton.cdiv(count, BLOCK)
    missing = tensors - len(counts)

    def sent(numbers, dtype):
        pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)

    first_blocks = sent(first_blocks + [NEVER] * missing, torch.int32)
    return first_blocks, sent([*counts, *[0] * missing], torch.int64), blocks


def _launch(pairs, aligned, weight):
    """Pairs of the same two dtypes, in the same order of memory, no target twice."""
    # Triton compiles anew for each pattern of aligned addresses in a tuple: all, or one tensor
    tensors = TENSORS if aligned else 1
    for start in range(0, len(pairs), tensors):
        some = pairs[start : start + tensors]
        device = some[0][0].device
        first_blocks, sizes, blocks = _table(tuple(t.numel() for t, _ in some), tensors, device)
        some = some + some[:1] * (tensors - len(some))
        with rows.device_of(some[0][0]):
            _ema_update_fwd_kernel[(blocks,)](
                tuple(t for t, _ in some), tuple(s for _, s in some),
                first_blocks, sizes, weight,
                TENSORS=tensors, BLOCK=BLOCK, CHUNK=CHUNK, ALIGNED=aligned, num_warps=4,
            )  # fmt: skip


def _packed(target, source):
    """The pair in one order of memory without gaps: themselves if they are so."""
    if source.stride() == target.stride() and _has_no_gaps(target):
        return target, source
    return target.contiguous(), source.contiguous()


def _has_no_gaps(t):
    """Whether the elements fill a piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def ema_update_fwd(targets, sources, momentum):
    """Sets every target to target + (1 - momentum) (source - target)."""
    waiting, seen, scattered = {}, set(), []

    def run():
        for (*_, aligned), pairs in waiting.items():
            _launch(pairs, aligned, 1 - momentum)
        for target, packed in scattered:
            target.copy_(packed)
        waiting.clear(), seen.clear(), scattered.clear()

    for target, source in zip(targets, sources, strict=True):
        if not target.is_floating_point() or momentum == 0:
            target.copy_(source)
            continue
        if momentum == 1 or target.numel() == 0:
            continue
        if (target.device, target.data_ptr()) in seen:
            run()  # a tied tensor comes twice: in turn, as separate calls would
        seen.add((target.device, target.data_ptr()))
        if not source.is_floating_point():
            source = source.to(torch.float64 if target.dtype == torch.float64 else torch.float32)
        packed, source = _packed(target, source)
        if packed is not target:
            scattered.append((target, packed))
        aligned = (packed.data_ptr() | source.data_ptr()) % rows.VECTOR_BYTES == 0
        kind = (target.device, target.dtype, source.dtype, aligned)
        waiting.setdefault(kind, []).append((packed, source))
        torch.autograd.graph.increment_version(target)
    run()
