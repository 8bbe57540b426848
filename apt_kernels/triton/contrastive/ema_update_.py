"""ema_update_ in Triton: a few dozen tensors a launch."""

import bisect
import functools

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows

CHUNK = 2048  # elements at a time: 16 a thread, eight 16-byte loads in flight
BLOCK = 4 * CHUNK  # elements of a program, beside which its look into the table counts for little
TENSORS = 32  # a launch; their addresses travel as arguments, so that the host copies no table
HEADS = tl.constexpr(rows.VECTOR_BYTES // 2)  # a tensor begins so many elements after a vector
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
# Passes: one, in place. Bytes: an element of both read, one written; VECTOR elements a load, 16
# bytes of the wider dtype, where a place so many elements ahead begins at 16 bytes in both tensors.
# Parallelism: one program a block of a tensor, found by comparing with the tensors' first blocks.
# Accuracy: float32, one rounding to the target's dtype; float64 targets in float64.
@triton.jit
def _ema_update_fwd_kernel(
    targets, sources, first_blocks_ptr, spans_ptr, weight: tl.float64,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first_blocks = tl.load(first_blocks_ptr + tl.arange(0, TENSORS))
    begun = first_blocks <= block
    which = tl.sum(begun.to(tl.int32), 0) - 1
    span = tl.load(spans_ptr + which)
    head, end = span % HEADS, span // HEADS
    first = (block - tl.max(tl.where(begun, first_blocks, 0), 0)).to(tl.int64) * BLOCK
    target_ptr, source_ptr = targets[0], sources[0]
    for i in tl.static_range(1, TENSORS):
        target_ptr = tl.where(which == i, targets[i], target_ptr)
        source_ptr = tl.where(which == i, sources[i], source_ptr)
    if VECTOR > 1:
        target_ptr, source_ptr = tl.multiple_of(target_ptr, 16), tl.multiple_of(source_ptr, 16)
    low, high = tl.cdiv(head, VECTOR), end // VECTOR  # the tensor's whole vectors
    for start in range(0, BLOCK, CHUNK):
        at = tl.max_contiguous(first + start + tl.arange(0, CHUNK), VECTOR)
        if (first + start >= head) & (first + start + CHUNK <= end):
            _update(target_ptr + at, source_ptr + at, None, weight)
        else:
            place = (first + start) // VECTOR + tl.arange(0, CHUNK) // VECTOR
            live = (place >= low) & (place < high)
            _update(target_ptr + at, source_ptr + at, live, weight)
    if (VECTOR > 1) and (first == 0):  # elements before and after them
        lane = tl.arange(0, 2 * VECTOR)
        before = lane < VECTOR
        edge = tl.where(before, head, (tl.maximum(low, high) - 1) * VECTOR) + lane
        live = edge < tl.where(before, tl.minimum(low * VECTOR, end), end)
        _update(target_ptr + edge, source_ptr + edge, live, weight)


@functools.lru_cache(maxsize=1024)  # a model's sizes stay: only its first update makes tables
def _table(heads, ends, tensors, device):
    """The first block of every tensor of a launch, its begin and end in one, and all blocks."""
    first_blocks, blocks = [], 0
    for end in ends:
        first_blocks.append(blocks)
        blocks += triton.cdiv(end, BLOCK)
    spans = [end * HEADS.value + head for head, end in zip(heads, ends, strict=True)]
    missing = tensors - len(ends)

    def sent(numbers, dtype):
        pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)

    first_blocks = sent(first_blocks + [NEVER] * missing, torch.int32)
    return first_blocks, sent(spans + [0] * missing, torch.int64), blocks


def _launch(pairs, vector, weight):
    """(head, target, source) of the same two dtypes, in the same order of memory, no target twice.

    vector 1: of any address.
    """
    # Triton compiles anew for each pattern of aligned addresses in a tuple: all, or one tensor
    tensors = TENSORS if vector > 1 else 1
    for start in range(0, len(pairs), tensors):
        heads, targets, sources = zip(*pairs[start : start + tensors], strict=True)
        device, missing = targets[0].device, tensors - len(heads)
        ends = tuple(head + t.numel() for head, t in zip(heads, targets, strict=True))
        first_blocks, spans, blocks = _table(heads, ends, tensors, device)
        targets, sources = (
            tuple(_begun_before(t, head) for t, head in zip(some, heads, strict=True))
            for some in (targets, sources)
        )
        with rows.device_of(targets[0]):
            _ema_update_fwd_kernel[(blocks,)](
                targets + targets[:1] * missing, sources + sources[:1] * missing,
                first_blocks, spans, weight,
                TENSORS=tensors, BLOCK=BLOCK, CHUNK=CHUNK, VECTOR=vector, num_warps=4,
            )  # fmt: skip


def _head(target, source):
    """The least number of elements before both that both have at a vector's beginning, or None."""
    for head in range(HEADS.value):
        if all(
            (t.data_ptr() - head * t.element_size()) % rows.VECTOR_BYTES == 0
            and t.storage_offset() >= head
            for t in (target, source)
        ):
            return head
    return None


def _begun_before(t, head):
    """The memory of t and that many elements before it."""
    if head == 0:
        return t
    return t.detach().as_strided((head + t.numel(),), (1,), t.storage_offset() - head)


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


class _Memory:
    """Pieces of memory, merged where they meet: one is found in the logarithm of their number."""

    def __init__(self):
        self.begins, self.ends = [], []

    def overlaps(self, begin, end):
        before = bisect.bisect_left(self.begins, end)
        return begin < end and before > 0 and self.ends[before - 1] > begin

    def add(self, begin, end):
        first = bisect.bisect_left(self.ends, begin)
        last = bisect.bisect_right(self.begins, end)
        if first < last:
            begin, end = min(begin, self.begins[first]), max(end, self.ends[last - 1])
        self.begins[first:last], self.ends[first:last] = [begin], [end]

    def clear(self):
        self.begins.clear(), self.ends.clear()


def _bytes(t):
    """The addresses of a tensor's first byte and of the end of its last; it has elements."""
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (steps + 1) * t.element_size()


def _apart(target, source):
    """The source, or a copy of it if the target's memory holds its elements in other places."""
    (begin, end), (source_begin, source_end) = _bytes(target), _bytes(source)
    if end <= source_begin or source_end <= begin:
        return source
    alike = target.dtype == source.dtype and target.stride() == source.stride()
    return source if alike and begin == source_begin else source.clone()


def ema_update_fwd(targets, sources, momentum):
    """Sets every target to target + (1 - momentum) (source - target), one pair after the other."""
    waiting, scattered, written, read = {}, [], _Memory(), _Memory()

    def run():
        for (*_, vector), pairs in waiting.items():
            _launch(pairs, vector, 1 - momentum)
        for target, packed in scattered:
            target.copy_(packed)
        waiting.clear(), scattered.clear(), written.clear(), read.clear()

    for target, source in zip(targets, sources, strict=True):
        copied = not target.is_floating_point() or momentum == 0
        if target.numel() == 0 or (momentum == 1 and not copied):
            continue
        to, of = _bytes(target), _bytes(source)
        if written.overlaps(*to) or written.overlaps(*of) or read.overlaps(*to):
            run()  # this pair needs the result of one that waits, or changes what it reads
        written.add(*to), read.add(*of)
        source = _apart(target, source)
        if copied:
            target.copy_(source)
            continue
        if not source.is_floating_point():
            source = source.to(torch.float64 if target.dtype == torch.float64 else torch.float32)
        packed, source = _packed(target, source)
        if packed is not target:
            scattered.append((target, packed))
        head = _head(packed, source)
        widest = max(target.element_size(), source.element_size())
        vector = 1 if head is None else rows.VECTOR_BYTES // widest
        kind = (target.device, target.dtype, source.dtype, vector)
        waiting.setdefault(kind, []).append((head or 0, packed, source))
        torch.autograd.graph.increment_version(target)
    run()
