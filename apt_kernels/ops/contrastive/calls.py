"""The kernels of `info_nce`, of `nt_xent` and of their rings of processes: schemas, arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...reference.numerics import accumulate_dtype

INFO_NCE = ("info_nce_fwd", "info_nce_bwd")
NT_XENT = ("nt_xent_fwd", "nt_xent_bwd")
dispatch.define(
    "info_nce_fwd(Tensor query, Tensor key, Tensor? negatives, Tensor? temperature_tensor, "
    "float temperature, bool normalize, bool symmetric, SymInt label_offset, "
    "SymInt? self_offset, bool need_slopes, "
    "Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "info_nce_bwd(Tensor? grad_losses, Tensor? grad_column_losses, Tensor query, Tensor key, "
    "Tensor? negatives, Tensor? temperature_tensor, float temperature, bool normalize, "
    "SymInt label_offset, SymInt? self_offset, Tensor row_stats, Tensor column_stats, "
    "bool need_query, bool need_key, bool need_negatives, "
    "bool unrounded=False) -> (Tensor, Tensor, Tensor)"
)
dispatch.define(
    "nt_xent_fwd(Tensor z1, Tensor z2, Tensor? temperature_tensor, float temperature, "
    "bool normalize, bool need_slopes, "
    "Tensor? before=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(
    "nt_xent_bwd(Tensor grad_losses, Tensor z1, Tensor z2, Tensor? temperature_tensor, "
    "float temperature, bool normalize, Tensor stats, bool unrounded=False) -> Tensor"
)


class InfoNCECall(NamedTuple):
    """The arguments of the forward kernel. before: statistics of classes that rows met already."""

    query: Tensor
    key: Tensor
    negatives: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    symmetric: bool
    label_offset: int
    self_offset: int | None
    need_slopes: bool
    before: Tensor | None = None


class InfoNCEBackwardCall(NamedTuple):
    """The arguments of the backward kernel. unrounded: gradients in the accumulation dtype."""

    grad_losses: Tensor | None
    grad_column_losses: Tensor | None
    query: Tensor
    key: Tensor
    negatives: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    label_offset: int
    self_offset: int | None
    row_stats: Tensor
    column_stats: Tensor
    need_query: bool
    need_key: bool
    need_negatives: bool
    unrounded: bool = False


class NTXentCall(NamedTuple):
    """The arguments of the forward kernel. before: statistics of classes that rows met already."""

    z1: Tensor
    z2: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    need_slopes: bool
    before: Tensor | None = None


class NTXentBackwardCall(NamedTuple):
    """The arguments of the backward kernel. unrounded: gradients in the accumulation dtype."""

    grad_losses: Tensor
    z1: Tensor
    z2: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    stats: Tensor
    unrounded: bool = False


@dispatch.fake("info_nce_fwd", "native")
def _fake_info_nce(*fields):
    call = InfoNCECall(*fields)
    rows = call.query.shape[0]
    losses = call.query.new_empty(rows, dtype=accumulate_dtype(call.query))
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    column_stats = stats.new_empty((rows if call.symmetric and call.before is None else 0, 2))
    after = stats.new_empty(0 if call.before is None else call.before.shape)
    slopes = losses.new_empty(rows if call.need_slopes else 0, dtype=torch.float64)
    return losses, torch.empty_like(losses), slopes, stats, column_stats, after


@dispatch.fake("info_nce_fwd", "triton")
def _(*fields):
    losses, correct, slopes, stats, column_stats, after = _fake_info_nce(*fields)
    slopes = losses.new_empty(slopes.shape)
    stats, column_stats = (losses.new_empty((s.shape[0], 4)) for s in (stats, column_stats))
    return losses, correct, slopes, stats, column_stats, after


@dispatch.fake("info_nce_bwd")
def _(*fields):
    call = InfoNCEBackwardCall(*fields)

    def gradient(need, of):
        of = call.key if of is None else of
        dtype = accumulate_dtype(of) if call.unrounded else of.dtype
        return of.new_empty(of.shape if need else 0, dtype=dtype)

    return (
        gradient(call.need_query, call.query),
        gradient(call.need_key, call.key),
        gradient(call.need_negatives, call.negatives),
    )


@dispatch.fake("nt_xent_fwd", "native")
def _fake_nt_xent(*fields):
    call = NTXentCall(*fields)
    rows = 2 * call.z1.shape[0]
    losses = call.z1.new_empty(rows, dtype=accumulate_dtype(call.z1))
    slopes = losses.new_empty(rows if call.need_slopes else 0, dtype=torch.float64)
    stats = losses.new_empty((rows, 2), dtype=torch.float64)
    after = stats.new_empty(0 if call.before is None else call.before.shape)
    return losses, torch.empty_like(losses), slopes, stats, after


@dispatch.fake("nt_xent_fwd", "triton")
def _(*fields):
    losses, correct, slopes, stats, after = _fake_nt_xent(*fields)
    slopes, stats = losses.new_empty(slopes.shape), losses.new_empty((stats.shape[0], 4))
    return losses, correct, slopes, stats, after


@dispatch.fake("nt_xent_bwd")
def _(*fields):
    call = NTXentBackwardCall(*fields)
    dtype = accumulate_dtype(call.z1) if call.unrounded else call.z1.dtype
    return call.z1.new_empty((2 * call.z1.shape[0], call.z1.shape[1]), dtype=dtype)
