"""token_logprobs in Triton: one program streams one row of logits."""

import torch
import triton
import triton.language as tl

from apt_kernels.triton.common import rows
from apt_kernels.triton.common.rows import (
    online_softmax,
    reciprocal,
    row_edge,
    row_span,
    scaled_logit,
)

WHOLE_ROW = tl.constexpr(2**31 - 1)
ID_LANES = 16  # ids are taken 16 at a time, so that K needs no compilation of its own
LENGTHS = ["stride_a", "stride_b", "B", "V", "K"]  # never specialised: no compilation for a length


def _block(V, wide):
    """Columns that a program takes at a time, and its warps: 8 columns a thread, 16 if wide."""
    threads, each = (128, 8) if V <= 1024 else (256, 16 if wide else 8)
    return threads * each, threads // rows.WARP_SIZE


# What: log-softmax gathered at K ids a row, the entropy and the log-sum-exp.
# Passes: one over the logits. Bytes: V elements a row read, K + 2 floats a row written.
# Parallelism: one program a row; masked rows are not read. Accuracy: float32, online maximum.
@triton.jit(do_not_specialize=LENGTHS)
def _token_logprobs_fwd_kernel(
    logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, logps_ptr, entropy_ptr, lse_ptr,
    stride_a: tl.int64, stride_b: tl.int64, B: tl.int64, V: tl.int32, K: tl.int32,
    temperature: tl.float32, softcap: tl.float32,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * K
    logps_ptr += row * K
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            for k in range(0, K, LANES):
                lane = k + tl.arange(0, LANES)
                tl.store(logps_ptr + lane, tl.zeros([LANES], tl.float32), mask=lane < K)
            tl.store(lse_ptr + row * 2, 0.0)
            tl.store(lse_ptr + row * 2 + 1, 0.0)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            return
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    inverse, rest = reciprocal(temperature)
    row_ptr = logits_ptr + (row // B) * stride_a + (row % B) * stride_b
    head, body = row_span(row_ptr, V, ALIGN)

    column, live = row_edge(head, body, V, ALIGN)
    edge_x = tl.load(row_ptr + column, mask=live, other=-float("inf")).to(tl.float32)
    edge_z = scaled_logit(edge_x, inverse, rest, softcap, SCALED, CAPPED)[0]
    m, s, u = online_softmax(-float("inf"), 0.0, 0.0, edge_z, WITH_ENTROPY)
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    for start in range(0, body, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(body_ptr + offset, mask=offset < body, other=-float("inf")).to(tl.float32)
        z = scaled_logit(x, inverse, rest, softcap, SCALED, CAPPED)[0]
        m, s, u = online_softmax(m, s, u, z, WITH_ENTROPY)

    log_s = tl.log(s)
    tl.store(lse_ptr + row * 2, m)
    tl.store(lse_ptr + row * 2 + 1, log_s)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_s - u / s)
    for k in range(0, K, LANES):
        lane = k + tl.arange(0, LANES)
        token = tl.load(ids_ptr + lane, mask=lane < K, other=0)
        inside = (token >= 0) & (token < V)
        token_x = tl.load(row_ptr + token, mask=inside & (lane < K), other=0.0).to(tl.float32)
        token_z = scaled_logit(token_x, inverse, rest, softcap, SCALED, CAPPED)[0]
        logp = tl.where(inside, token_z - m - log_s, float("nan"))
        tl.store(logps_ptr + lane, logp, mask=lane < K)


@triton.jit
def _grad_logits(
    x, column, first, token, token_grad, ids_ptr, grad_logps_ptr, total, entropy_grad, entropy,
    m, log_s, K, inverse, rest, softcap,
    SPAN: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient at the logits x of the given columns, all within [first, first + SPAN)."""
    z, slope = scaled_logit(x, inverse, rest, softcap, SCALED, CAPPED)
    logp = z - m - log_s
    p = tl.exp(logp)
    weight = total
    if WITH_ENTROPY:
        weight += entropy_grad * (logp + entropy)
    grad = tl.where(p == 0, 0.0, -p * weight)  # 0 * -inf of an excluded column would be NaN
    # Ids are compared in 64 bits: one out of range must not come back into it when cut to 32.
    end = first.to(tl.int64) + SPAN
    if (token >= first) & (token < end):
        grad += tl.where(column == token.to(tl.int32), token_grad, 0.0)
    for k in range(1, K):  # the first id, mostly the only one, is not loaded in every block
        other = tl.load(ids_ptr + k)
        if (other >= first) & (other < end):
            grad += tl.where(column == other.to(tl.int32), tl.load(grad_logps_ptr + k), 0.0)
    return grad * slope


@triton.jit
def _store_zeros(row_ptr, V, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    dtype = row_ptr.dtype.element_ty
    head, body = row_span(row_ptr, V, ALIGN)
    column, live = row_edge(head, body, V, ALIGN)
    tl.store(row_ptr + column, tl.zeros([2 * ALIGN], dtype), mask=live)
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    for start in range(0, body, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        tl.store(body_ptr + offset, tl.zeros([BLOCK], dtype), mask=offset < body)


@triton.jit
def _stream_gradient(
    row_ptr, grad_ptr, head, body, token, token_grad, ids_ptr, grad_logps_ptr, total, entropy_grad,
    entropy, m, log_s, K, inverse, rest, softcap,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    STORES_ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradient of the body of a row, whose loads are aligned and whose stores may be."""
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    out_ptr = grad_ptr + head
    if STORES_ALIGNED:
        out_ptr = tl.multiple_of(out_ptr, 16)
    for start in range(0, body, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(body_ptr + offset, mask=offset < body, other=-float("inf")).to(tl.float32)
        grad = _grad_logits(
            x, head + offset, head + start, token, token_grad, ids_ptr, grad_logps_ptr, total,
            entropy_grad, entropy, m, log_s, K, inverse, rest, softcap, BLOCK, SCALED, CAPPED,
            WITH_ENTROPY,
        )  # fmt: skip
        tl.store(out_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=offset < body)


# What: the gradient of logps and entropy at the logits; an id out of range adds no term.
# Passes: one over the logits. Bytes: V elements a row read, V written; masked rows only written.
# Parallelism: one program a row; no atomics, K ids are added in order. Accuracy: float32.
@triton.jit(do_not_specialize=LENGTHS)
def _token_logprobs_bwd_kernel(
    grad_logps_ptr, grad_entropy_ptr, logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, lse_ptr,
    entropy_ptr, grad_logits_ptr,
    stride_a: tl.int64, stride_b: tl.int64, B: tl.int64, V: tl.int32, K: tl.int32,
    temperature: tl.float32, softcap: tl.float32,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * K
    grad_logps_ptr += row * K
    grad_ptr = grad_logits_ptr + row * V
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            _store_zeros(grad_ptr, V, ALIGN, BLOCK)
            return
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    inverse, rest = reciprocal(temperature)
    m = tl.load(lse_ptr + row * 2)
    log_s = tl.load(lse_ptr + row * 2 + 1)
    token = tl.load(ids_ptr, mask=K > 0, other=-1)
    token_grad = tl.load(grad_logps_ptr, mask=K > 0, other=0.0)
    total = 0.0
    for k in range(0, K, LANES):
        lane = k + tl.arange(0, LANES)
        other = tl.load(ids_ptr + lane, mask=lane < K, other=-1)
        inside = (other >= 0) & (other < V)
        total += tl.sum(tl.load(grad_logps_ptr + lane, mask=inside, other=0.0), 0)
    entropy_grad = 0.0
    entropy = 0.0
    if WITH_ENTROPY:
        entropy_grad = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)

    row_ptr = logits_ptr + (row // B) * stride_a + (row % B) * stride_b
    head, body = row_span(row_ptr, V, ALIGN)
    column, live = row_edge(head, body, V, ALIGN)
    x = tl.load(row_ptr + column, mask=live, other=-float("inf")).to(tl.float32)
    grad = _grad_logits(
        x, column, head * 0, token, token_grad, ids_ptr, grad_logps_ptr, total, entropy_grad,
        entropy, m, log_s, K, inverse, rest, softcap, WHOLE_ROW, SCALED, CAPPED, WITH_ENTROPY,
    )  # fmt: skip
    tl.store(grad_ptr + column, grad.to(grad_ptr.dtype.element_ty), mask=live)
    # The rows of a slice (logits[:, :-1]) and the rows of its gradient may be aligned differently.
    if ((row_ptr.to(tl.int64) ^ grad_ptr.to(tl.int64)) & 15) == 0:
        _stream_gradient(
            row_ptr, grad_ptr, head, body, token, token_grad, ids_ptr, grad_logps_ptr, total,
            entropy_grad, entropy, m, log_s, K, inverse, rest, softcap, BLOCK, SCALED, CAPPED,
            WITH_ENTROPY, True,
        )  # fmt: skip
    else:
        _stream_gradient(
            row_ptr, grad_ptr, head, body, token, token_grad, ids_ptr, grad_logps_ptr, total,
            entropy_grad, entropy, m, log_s, K, inverse, rest, softcap, BLOCK, SCALED, CAPPED,
            WITH_ENTROPY, False,
        )  # fmt: skip


def token_logprobs_fwd(
    logits, token_ids, mask, temperature_tensor, temperature, softcap, return_entropy
):
    """(logps (A,B,K), entropy (A,B) or (0,), lse (A,B,2)), all float32; masked rows are 0.

    lse is the pair (maximum, log of the sum of e^(z - maximum)): their sum in one float would
    cost the backward pass the digits of large logits.
    """
    A, B, V = logits.shape
    K = token_ids.shape[-1]
    logps = logits.new_empty((A, B, K), dtype=torch.float32)
    entropy = logits.new_empty((A, B) if return_entropy else (0,), dtype=torch.float32)
    lse = logits.new_empty((A, B, 2), dtype=torch.float32)
    if A * B == 0:
        return logps, entropy, lse
    block, warps = _block(V, wide=logits.element_size() == 2)
    with rows.device_of(logits):
        _token_logprobs_fwd_kernel[(A * B,)](
            logits, token_ids, mask, temperature_tensor, logps, entropy, lse,
            logits.stride(0), logits.stride(1), B, V, K, temperature, softcap,
            ALIGN=rows.VECTOR_BYTES // logits.element_size(), BLOCK=block, LANES=ID_LANES,
            SCALED=temperature_tensor is not None or temperature != 1.0,
            CAPPED=softcap > 0, WITH_ENTROPY=return_entropy, num_warps=warps,
        )  # fmt: skip
    return logps, entropy, lse


def token_logprobs_bwd(
    grad_logps, grad_entropy, logits, token_ids, mask, temperature_tensor, lse, entropy,
    temperature, softcap,
):  # fmt: skip
    """grad_logits (A,B,V), contiguous, in the dtype of the logits; masked rows are exactly 0."""
    A, B, V = logits.shape
    K = token_ids.shape[-1]
    grad_logits = logits.new_empty((A, B, V))
    if A * B == 0:
        return grad_logits
    block, warps = _block(V, wide=False)  # 16 columns a thread take 128 registers here
    with rows.device_of(logits):
        _token_logprobs_bwd_kernel[(A * B,)](
            grad_logps, grad_entropy, logits, token_ids, mask, temperature_tensor, lse, entropy,
            grad_logits, logits.stride(0), logits.stride(1), B, V, K, temperature, softcap,
            ALIGN=rows.VECTOR_BYTES // logits.element_size(), BLOCK=block, LANES=ID_LANES,
            SCALED=temperature_tensor is not None or temperature != 1.0,
            CAPPED=softcap > 0, WITH_ENTROPY=grad_entropy is not None, num_warps=warps,
        )  # fmt: skip
    return grad_logits
