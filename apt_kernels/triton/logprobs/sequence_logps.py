"""sequence_logps in Triton: one program sums one sequence."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.rows import row_edge, row_span
from apt_kernels.triton.common.token_windows import row_strides

BLOCK = 1024  # tokens a program takes at a time: 16 bytes a thread
LENGTHS = ["stride_b", "stride_t", "T"]


@triton.jit
def _counts(mask_ptr, head, offset, inside, ALIGN: tl.constexpr):
    """Which tokens count: by words of ALIGN bytes, where the mask lies as the numbers beside it."""
    if (mask_ptr + head).to(tl.int64) % ALIGN == 0:
        body_ptr = tl.multiple_of(mask_ptr + head, ALIGN)
        counts = tl.load(body_ptr + offset, mask=inside, other=0) != 0
    else:
        counts = tl.load(mask_ptr + head + offset, mask=inside, other=0) != 0
    return counts


# What: sum or mean of a row's log-probabilities where the mask is true.
# Passes: one. Bytes: T log-probabilities and T mask bytes a row read, 4 bytes written.
# Parallelism: one program a row. Accuracy: float32, a fixed order of sums.
@triton.jit(do_not_specialize=LENGTHS)
def _sequence_logps_fwd_kernel(
    logps_ptr, mask_ptr, out_ptr, tokens_ptr, stride_b: tl.int64, stride_t: tl.int64, T: tl.int32,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT
    row_ptr = logps_ptr + row * stride_b * UNIT
    mask_ptr += row * T
    if UNIT > 1:
        head, body = T * 0, T
        body_ptr = row_ptr
    elif ADJACENT:
        head, body = row_span(row_ptr, T, ALIGN)
        body_ptr = tl.multiple_of(row_ptr + head, 16)
    else:
        head, body = T * 0, T // ALIGN * ALIGN
        body_ptr = row_ptr
    column, live = row_edge(head, body, T, ALIGN)
    counts = tl.load(mask_ptr + column, mask=live, other=0) != 0
    if ADJACENT:
        x = tl.load(row_ptr + column, mask=live, other=0.0)
    else:
        x = tl.load(row_ptr + column * stride_t, mask=live, other=0.0)
    total = tl.sum(tl.where(counts, x.to(tl.float32), 0.0), 0)
    tokens = tl.sum(counts.to(tl.int32), 0)
    for start in range(0, body, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < body
        kept = _counts(mask_ptr, head, offset, inside, ALIGN)
        if ADJACENT:
            value = tl.load(body_ptr + offset, mask=inside, other=0.0)
        else:
            value = tl.load(body_ptr + offset * stride_t, mask=inside, other=0.0)
        total += tl.sum(tl.where(kept, value.to(tl.float32), 0.0), 0)
        tokens += tl.sum(kept.to(tl.int32), 0)
    if tokens_ptr is not None:
        number = tl.maximum(tokens, 1).to(tl.float32)
        total = total / number
        tl.store(tokens_ptr + row, number)
    tl.store(out_ptr + row, total)


# What: the row's gradient where the mask is true, 0 elsewhere.
# Passes: one. Bytes: T mask bytes a row read, 4 T written.
# Parallelism: one program a row. Accuracy: exact.
@triton.jit(do_not_specialize=["T"])
def _sequence_logps_bwd_kernel(
    grad_ptr, mask_ptr, grad_logps_ptr, T: tl.int32,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T *= UNIT
    mask_ptr += row * T
    out_ptr = grad_logps_ptr + row * T
    grad = tl.load(grad_ptr + row)
    if UNIT > 1:
        head, body = T * 0, T
        body_ptr = out_ptr
    else:
        head, body = row_span(out_ptr, T, ALIGN)
        body_ptr = tl.multiple_of(out_ptr + head, 16)
    column, live = row_edge(head, body, T, ALIGN)
    counts = tl.load(mask_ptr + column, mask=live, other=0) != 0
    tl.store(out_ptr + column, tl.where(counts, grad, 0.0), mask=live)
    for start in range(0, body, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        kept = _counts(mask_ptr, head, offset, offset < body, ALIGN)
        tl.store(body_ptr + offset, tl.where(kept, grad, 0.0), mask=offset < body)


def sequence_logps_fwd(logps, mask, average):
    """(sums or means (B,), of how many tokens, at least 1, they are means, or (0,)), float32."""
    B, T = logps.shape
    out = logps.new_empty((B,), dtype=torch.float32)
    tokens = out.new_empty(B if average else 0)
    if B == 0:
        return out, tokens
    align = rows.VECTOR_BYTES // logps.element_size()
    adjacent = logps.stride(1) == 1
    unit, (stride_b,) = row_strides(T, logps) if adjacent else (1, (logps.stride(0),))
    with rows.device_of(logps):
        _sequence_logps_fwd_kernel[(B,)](
            logps, mask, out, tokens if average else None, stride_b, logps.stride(1), T // unit,
            UNIT=unit, ALIGN=align, BLOCK=BLOCK, ADJACENT=adjacent,
            num_warps=BLOCK // align // rows.WARP_SIZE,
        )  # fmt: skip
    return out, tokens


def sequence_logps_bwd(grad, mask):
    """grad_logps (B,T), float32 and contiguous."""
    B, T = mask.shape
    grad_logps = grad.new_empty((B, T), dtype=torch.float32)
    if B == 0 or T == 0:
        return grad_logps
    align = rows.VECTOR_BYTES // grad_logps.element_size()
    unit, _ = row_strides(T, grad_logps)
    with rows.device_of(grad):
        _sequence_logps_bwd_kernel[(B,)](
            grad, mask, grad_logps, T // unit,
            UNIT=unit, ALIGN=align, BLOCK=BLOCK,
            num_warps=BLOCK // align // rows.WARP_SIZE,
        )  # fmt: skip
    return grad_logps
