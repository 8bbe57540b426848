"""The project's CUDA kernels as functions of CPU tensors: compiled by g++, emulated (emulator.h).

    from gpu import cuda_emulation
    kernels = cuda_emulation.kernels()          # a backend: token_logprobs_fwd, dpo_loss_fwd, ...
    logps, entropy, lse = kernels.token_logprobs_fwd(logits, ids, None, None, 1.0, 0.0, True)

Needs g++ alone: no CUDA, no GPU. The signatures are those of `torch.ops.apt`. A kernel that breaks
a rule of CUDA (barriers, exchanges, deadlock) raises RuntimeError. The library is built once per
state of the sources, in build/cuda_emulation.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apt_kernels import codes

from .build import BuildError, build, compiler

__all__ = ["BuildError", "Emulation", "Traffic", "build", "compiler", "kernels"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class _LogitsRows(ctypes.Structure):  # apt::cuda::LogitsRows
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("A", "B", "V", "stride_a", "stride_b")),
        ("mask", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True)
class Traffic:
    """What the loads, or the stores, with a cache hint asked of memory."""

    requests: int  # of warps
    bytes: int
    sectors: int  # of 32 bytes, those that two requests touch counted twice


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    # a null pointer for no elements too: a kernel must not touch them
    return ctypes.c_void_p(None if t is None or t.numel() == 0 else t.data_ptr())


def _poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """New memory; NaN tells which elements a kernel forgot to write."""
    return torch.full(shape, torch.nan, dtype=dtype)


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class Emulation:
    """One build of the kernels. The emulator runs one kernel at a time: calls hold a lock."""

    def __init__(self, library: Path, order: str = "forward", seed: int = 0):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_emulation_error.restype = ctypes.c_char_p
        self._library.pair_loss_workspace.restype = ctypes.c_int64
        self._lock = threading.Lock()
        self.set_order(order, seed)

    def set_order(self, order: str, seed: int = 0) -> None:
        """In which order the threads of a block run: "forward", "reverse" or "random"."""
        self._library.cuda_emulation_set_order(_ORDERS[order], ctypes.c_uint(seed))

    def start_counting(self) -> None:
        self._library.cuda_emulation_start_counting()

    def stop_counting(self) -> tuple[Traffic, Traffic]:
        """The loads and the stores since counting started."""
        counts = (ctypes.c_int64 * 6)()
        self._library.cuda_emulation_stop_counting(counts)
        return Traffic(*counts[:3]), Traffic(*counts[3:])

    def _call(self, name: str, *arguments) -> None:
        with self._lock:
            if getattr(self._library, name)(*arguments) != 0:
                message = self._library.cuda_emulation_error().decode()
                raise RuntimeError(f"{name}: {message or 'arguments that the launcher refuses'}")

    def token_logprobs_fwd(
        self, logits, token_ids, mask, temperatures, temperature, softcap, return_entropy
    ):
        A, B, K = token_ids.shape
        logps = _poisoned(A, B, K)
        entropy = _poisoned(A, B) if return_entropy else _poisoned(0)
        lse = _poisoned(A, B, dtype=torch.float64)
        rows = _logits_rows(logits, mask, temperatures, temperature, softcap)
        self._call(
            "token_logprobs_fwd",
            ctypes.byref(rows),
            _pointer(token_ids),
            _int(K),
            _pointer(logps),
            _pointer(entropy),
            _pointer(lse),
        )
        return logps, entropy, lse

    def token_logprobs_bwd(
        self,
        grad_logps,
        grad_entropy,
        logits,
        token_ids,
        mask,
        temperatures,
        lse,
        entropy,
        temperature,
        softcap,
    ):
        grad_logits = _poisoned(*logits.shape, dtype=logits.dtype)
        rows = _logits_rows(logits, mask, temperatures, temperature, softcap)
        self._call(
            "token_logprobs_bwd",
            _pointer(grad_logps),
            _pointer(grad_entropy),
            ctypes.byref(rows),
            _pointer(token_ids),
            _int(token_ids.shape[-1]),
            _pointer(lse),
            _pointer(entropy),
            _pointer(grad_logits),
        )
        return grad_logits

    def dpo_loss_fwd(
        self,
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        loss_type,
        reduction,
        beta,
        label_smoothing,
        discopop_tau,
        simpo_gamma,
    ):
        extra = {
            codes.DPO_LOSS_TYPES["discopop"]: discopop_tau,
            codes.DPO_LOSS_TYPES["simpo"]: simpo_gamma,
        }.get(loss_type, 0.0)
        B = policy_chosen.numel()
        loss, workspace = self._reduction(B, reduction)
        rewards = _poisoned(B), _poisoned(B)
        grads = _poisoned(2, B)
        self._call(
            "dpo_loss_fwd",
            *map(_pointer, (policy_chosen, policy_rejected, ref_chosen, ref_rejected)),
            _DTYPES[policy_chosen.dtype],
            _int(B),
            loss_type,
            reduction,
            *map(ctypes.c_double, (beta, label_smoothing, extra)),
            *map(_pointer, (loss, *rewards, grads, workspace)),
        )
        return loss, *rewards, grads

    def bradley_terry_loss_fwd(self, chosen, rejected, margins, margin, center_coef, reduction):
        B = chosen.numel()
        loss, workspace = self._reduction(B, reduction)
        grads = _poisoned(2, B)
        self._call(
            "bradley_terry_loss_fwd",
            _pointer(chosen),
            _pointer(rejected),
            _DTYPES[chosen.dtype],
            _pointer(margins),
            _int(B),
            ctypes.c_double(margin),
            ctypes.c_double(center_coef),
            reduction,
            *map(_pointer, (loss, grads, workspace)),
        )
        return loss, grads

    def gae_fwd(
        self,
        rewards,
        values,
        mask,
        terminated,
        truncated,
        bootstrap,
        cu_seqlens,
        gamma,
        gae_lambda,
        whiten,
        time_major,
    ):
        advantages, returns = (_poisoned(*rewards.shape) for _ in range(2))
        if cu_seqlens is None:
            rows, length = rewards.shape[::-1] if time_major else rewards.shape
            per_step = bootstrap is not None and bootstrap.dim() == 2
        else:
            rows, length = len(cu_seqlens) - 1, len(rewards)
            per_step = bootstrap is not None and len(bootstrap) != rows
        inputs = (rewards, values, mask, terminated, truncated, bootstrap)
        flat_mask = mask.contiguous() if whiten and mask is not None else None
        workspace = _poisoned(3 * 256, dtype=torch.float64) if whiten else None
        outputs = (advantages, returns, cu_seqlens, flat_mask, workspace)
        out_strides = (1, rows) if time_major else (length, 1)
        numbers = (_DTYPES[rewards.dtype], rows, length, int(per_step), *out_strides)
        self._call(
            "gae_fwd",
            _pointers(inputs),
            _ints([s for t in inputs for s in _row_and_step(t, time_major)]),
            _pointers(outputs),
            _ints(numbers),
            ctypes.c_double(gamma),
            ctypes.c_double(gae_lambda),
        )
        return advantages, returns

    def mlm_mask_fwd(
        self,
        input_ids,
        attention_mask,
        special_tokens_mask,
        sample_ids,
        word_ids,
        special_runs,
        *rest,
    ):
        B, T = input_ids.shape
        results = [torch.full((B, T), 77, dtype=input_ids.dtype) for _ in range(2)]
        results.append(torch.full((B, T), True))
        inputs = (input_ids, attention_mask, special_tokens_mask, sample_ids, word_ids)
        sizes = [0 if m is None else m.element_size() for m in inputs[:3]]
        numbers = (B, T, *sizes, *map(int, rest))
        self._call(
            "mlm_mask_fwd",
            _pointers((*inputs, *results)),
            _ints(numbers),
            _ints(special_runs),
            _int(len(special_runs) // 2),
        )
        return tuple(results)

    def _reduction(self, pairs: int, reduction: int) -> tuple[Tensor, Tensor]:
        size = self._library.pair_loss_workspace(_int(pairs), reduction)
        return _poisoned(*((pairs,) if reduction == 0 else ())), _poisoned(size)


def _pointers(tensors) -> ctypes.Array:
    values = [_pointer(t).value for t in tensors]
    return (ctypes.c_void_p * len(values))(*values)


def _ints(values) -> ctypes.Array:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def _row_and_step(t: Tensor | None, time_major: bool) -> tuple[int, int]:
    """Strides; of one dimension, from one to the next."""
    if t is None:
        return 0, 0
    if t.dim() == 1:
        return t.stride(0), t.stride(0)
    return (t.stride(1), t.stride(0)) if time_major else t.stride()


def _logits_rows(logits, mask, temperatures, temperature, softcap) -> _LogitsRows:
    return _LogitsRows(
        _pointer(logits),
        _DTYPES[logits.dtype],
        *logits.shape,
        *logits.stride()[:2],
        _pointer(mask),
        _pointer(temperatures),
        temperature,
        softcap,
    )


@functools.cache
def kernels(
    sanitizer: str = "",
    patches: tuple[tuple[str, str, str], ...] = (),
    order: str = "forward",
    seed: int = 0,
) -> Emulation:
    """Builds the kernels where needed and returns them as a backend.

    Args:
        sanitizer: "", "address" (the process needs LD_PRELOAD of libasan) or "thread" (libtsan).
        patches: `(file of csrc/cuda, text, replacement)`, to seed a bug.
        order: in which the threads of a block run: "forward", "reverse" or "random".
        seed: of the random order.
    """
    return Emulation(build(sanitizer, patches), order, seed)
