"""Bugs written into the CUDA sources: the checks must catch every one of them.

A bug is `(file, text, replacement)`; `by` says what sees it:

| by      | what it is                                                                            |
|---------|---------------------------------------------------------------------------------------|
| values  | results or gradients differ from float64 (unwritten memory and shared memory are NaN) |
| rules   | the emulator reports a broken rule of CUDA                                            |
| address | AddressSanitizer or UBSan                                                             |
| thread  | ThreadSanitizer                                                                       |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from gpu import cuda_emulation
from gpu.cuda_emulation import sanitized
from gpu.cuda_emulation.checks import CHECKS

ROW, PAIR, DPO = "token_logprobs.cu", "pair_loss.cuh", "dpo_loss.cu"
GAE, MLM = "gae.cu", "mlm_mask.cu"
VECTORS, COMMON, SOFTMAX = "row_vectors.cuh", "common.cuh", "online_softmax.cuh"
BARRIER = "  __syncthreads();  // every warp's partial result is written before any is read\n"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...]
    by: tuple[str, ...] = ("values",)

    @property
    def patch(self) -> tuple[tuple[str, str, str], ...]:
        return ((self.file, self.old, self.new),)


BUGS = (
    Bug(
        "barrier_of_a_sum_dropped",
        COMMON,
        BARRIER + "  return warp_sum(",
        "  return warp_sum(",
        ("several_warps",),
        ("values", "thread"),
    ),
    Bug(
        "barrier_of_the_maximum_dropped",
        COMMON,
        BARRIER + "  return warp_max(",
        "  return warp_max(",
        ("several_warps",),
        ("values", "thread"),
    ),
    Bug(
        "barrier_before_the_gathered_columns_dropped",
        ROW,
        "  __syncthreads();  // the columns are written",
        "  // the columns are written",
        ("several_warps",),
        ("values", "thread"),
    ),
    Bug(
        "shared_memory_of_two_sums_shared",
        SOFTMAX,
        "weighted = block_sum(weighted, weighted_sums)",
        "weighted = block_sum(weighted, sums)",
        ("several_warps",),
        ("thread",),
    ),
    Bug(
        "barrier_in_a_branch",
        ROW,
        "  softmax.reduce(scale);\n",
        "  if (threadIdx.x < 32) softmax.reduce(scale);\n",
        ("several_warps",),
        ("rules",),
    ),
    Bug(
        "exchange_in_a_branch",
        ROW,
        "  return warp_sum(sum);",
        "  return K > threadIdx.x % 32 ? warp_sum(sum) : 0.0f;",
        ("several_ids",),
        ("rules",),
    ),
    Bug("mask_shifted", ROW, "!logits.mask[blockIdx.x]", "!logits.mask[blockIdx.x + 1]", ("mask",)),
    Bug(
        "masked_gradient_computed",
        ROW,
        "  if (is_masked(logits)) return zero_row(grad_logits, V);\n",
        "",
        ("mask",),
    ),
    Bug(
        "strides_swapped",
        ROW,
        "a * logits.stride_a + b * logits.stride_b",
        "a * logits.stride_b + b * logits.stride_a",
        ("strides",),
    ),
    Bug(
        "last_row_forgotten",
        ROW,
        "<<<rows, threads, 0, stream>>>(logits",
        "<<<rows - (rows > 1), threads, 0, stream>>>(logits",
        ("strides",),
    ),
    Bug(
        "one_element_past_the_row",
        VECTORS,
        "i < length - inside",
        "i <= length - inside",
        ("exact_buffers-float32",),
        ("values", "address"),
    ),
    Bug(
        "one_vector_past_the_row",
        VECTORS,
        "  if (end > length) cut.vectors -= 1;",
        "  (void)end;",
        ("exact_buffers-bfloat16",),
        ("address",),
    ),
    Bug(
        "vectors_not_aligned",
        VECTORS,
        "(kSize - elements_past_boundary(row)) % kSize",
        "0 * elements_past_boundary(row)",
        ("exact_buffers-float32",),
        ("address",),
    ),
    Bug(
        "tail_forgotten",
        VECTORS,
        "i < length - inside;",
        "i < cut.head;",
        ("vocabulary_31-float32",),
    ),
    Bug(
        "words_shifted_the_wrong_way",
        VECTORS,
        "words[i] = words[i + 1];",
        "words[i] = words[i];",
        ("alignments_517-float32",),
    ),
    Bug("bits_not_shifted", VECTORS, "bytes % 4 * 8", "0", ("alignments_517-bfloat16",)),
    Bug(
        "bfloat16_accumulation",
        SOFTMAX,
        "    sum += chunk;",
        "    sum = to_float(__float2bfloat16_rn(sum + chunk));",
        ("vocabulary_2053-float32",),
    ),
    Bug("sum_not_rescaled", SOFTMAX, "    sum *= factor;\n", "", ("large_logits",)),
    Bug(
        "entropy_not_rescaled",
        SOFTMAX,
        "weighted * factor + sum * (factor * step)",
        "weighted * factor",
        ("large_logits",),
    ),
    Bug(
        "excluded_column_in_the_entropy",
        SOFTMAX,
        "term * fmaxf(difference, -FLT_MAX)",
        "term * difference",
        ("excluded_columns",),
    ),
    Bug(
        "excluded_column_in_the_gradient",
        ROW,
        "p == 0.0f ? 0.0f : p * ",
        "p * ",
        ("excluded_columns",),
    ),
    Bug(
        "lse_rounded_to_float",
        ROW,
        "make_float2(softmax.max, log_sum)",
        "make_float2(softmax.max + log_sum / inverse, 0.0f)",
        ("large_logits",),
    ),
    Bug(
        "id_of_the_size_allowed",
        ROW,
        "    if (id >= 0 && id < V) {",
        "    if (id >= 0 && id <= V) {",
        ("wild_ids",),
    ),
    Bug(
        "first_of_equal_ids_only",
        ROW,
        "if (token_ids[other] == id) gathered +=",
        "if (other == k) gathered +=",
        ("several_ids",),
    ),
    Bug(
        "every_equal_id_writes",
        ROW,
        "first = token_ids[other] != id;",
        "first = true;",
        ("several_warps",),
        ("values", "thread"),
    ),
    Bug(
        "slope_of_the_cap_forgotten",
        ROW,
        "slope *= 1.0f - t * t;",
        "",
        ("temperature_and_softcap",),
    ),
    Bug(
        "entropy_gradient_dropped",
        ROW,
        "fmaf(grad_entropy, logp, pull)",
        "pull",
        ("several_warps",),
    ),
    Bug(
        "offsets_of_32_bits",
        ROW,
        "a * logits.stride_a",
        "int(a * logits.stride_a)",
        ("wide_strides",),
    ),
    Bug(
        "last_pair_forgotten",
        PAIR,
        "i < out.pairs; i += step",
        "i < out.pairs - 1; i += step",
        ("bradley_terry",),
    ),
    Bug(
        "mean_of_the_loss_only",
        PAIR,
        "result.grad_rejected * out.scale",
        "result.grad_rejected",
        ("bradley_terry",),
    ),
    Bug(
        "second_launch_forgotten",
        PAIR,
        "blocks == 1 || reduction",
        "blocks >= 1 || reduction",
        ("several_blocks",),
    ),
    Bug(
        "label_smoothing_ignored",
        DPO,
        "wrong = sign * k.label_smoothing;",
        "wrong = 0.0f * sign;",
        ("dpo_loss-sigmoid",),
    ),
    Bug(
        "overflow_of_discopop",
        DPO,
        "expf(log_sigmoid(scaled) - above)",
        "expf(-x) * sigmoid(scaled)",
        ("dpo_loss-discopop",),
    ),
    Bug(
        "reference_of_the_other",
        DPO,
        "r -= to_float(ref_rejected[i]);",
        "r -= to_float(ref_chosen[i]);",
        ("dpo_loss-hinge",),
    ),
    Bug(
        "barrier_before_the_first_steps_dropped",
        GAE,
        "    __syncthreads();  // the first steps",
        "    // the first steps",
        ("gae_several_tiles",),
        ("values", "thread"),
    ),
    Bug(
        "barrier_before_the_maps_dropped",
        GAE,
        "    __syncthreads();  // the maps of all warps",
        "    // the maps of all warps",
        ("gae_several_tiles",),
        ("values", "thread"),
    ),
    Bug(
        "barrier_between_two_sums_dropped",
        GAE,
        "  __syncthreads();  // the sum before has been read\n",
        "",
        ("gae_several_tiles",),
        ("thread",),
    ),
    Bug(
        "value_of_the_next_slot_instead_of_the_next_that_counts",
        GAE,
        "value, later ? __ffs(later) - 1 : lane);",
        "value, (lane + 1) % kWarpSize);",
        ("gae_several_tiles",),
    ),
    Bug(
        "trace_of_the_wrong_warp",
        GAE,
        "if (w == warp + 1) behind = trace;",
        "if (w == warp) behind = trace;",
        ("gae_several_tiles",),
    ),
    Bug(
        "first_step_after_the_tile_forgotten",
        GAE,
        "    after = all;\n",
        "",
        ("gae_several_tiles",),
    ),
    Bug(
        "cut_multiplied_instead_of_selected",
        GAE,
        "decay == 0.0f ? delta : delta + decay * x",
        "delta + decay * x",
        ("gae_what_follows_a_cut_does_not_matter",),
    ),
    Bug(
        "truncation_wins_over_termination",
        GAE,
        "  if (ends) {\n    next = 0.0f;\n  } else if",
        "  if",
        ("gae_samples-float32",),
    ),
    Bug(
        "sequences_run_into_each_other",
        GAE,
        "(end < a.length ? end : a.length) - s.first",
        "a.length - s.first",
        ("gae_packed",),
    ),
    Bug(
        "masked_steps_not_written",
        GAE,
        "      write(a, s, t, 0.0f, 0.0f);\n",
        "",
        ("gae_samples-float32",),
    ),
    Bug(
        "biased_variance",
        GAE,
        "count > 2.0 ? count - 1.0 : 1.0",
        "count",
        ("gae_side_by_side",),
    ),
    Bug(
        "blocks_that_whiten_nothing_added",
        GAE,
        "wrote ? workspace[quantity * kGaeWhitenBlocks + block] : 0.0",
        "workspace[quantity * kGaeWhitenBlocks + block]",
        ("gae_side_by_side",),
    ),
    Bug(
        "round_of_philox_dropped",
        MLM,
        "round < 10",
        "round < 9",
        ("mlm_mask_samples",),
    ),
    Bug(
        "words_restart_in_every_tile",
        MLM,
        "      word_start = total > word_start ? total : word_start;\n",
        "",
        ("mlm_mask_several_tiles",),
    ),
    Bug(
        "barrier_of_the_scan_dropped",
        MLM,
        "  __syncthreads();  // every warp's largest is written before any is read\n",
        "",
        ("mlm_mask_several_tiles",),
        ("thread",),
    ),
    Bug(
        "barrier_of_the_minimum_dropped",
        MLM,
        "  __syncthreads();  // every warp's smallest is written before any is read\n",
        "",
        ("mlm_mask_several_tiles",),
        ("values", "thread"),
    ),
    Bug(
        "barrier_before_the_next_words_dropped",
        MLM,
        "  __syncthreads();  // every warp has read before the next tile writes\n",
        "",
        ("mlm_mask_several_tiles",),
        ("thread",),
    ),
    Bug(
        "special_words_drawn",
        MLM,
        "if (id >= a.special_runs.first[r]) id += a.special_runs.size[r];",
        "(void)r;",
        ("mlm_mask_samples",),
    ),
    Bug(
        "labels_of_every_slot",
        MLM,
        "chosen ? id : static_cast<T>(kIgnored)",
        "id",
        ("mlm_mask_samples",),
    ),
    Bug(
        "slot_past_the_row",
        MLM,
        "const bool live = slot < a.length;",
        "const bool live = slot <= a.length;",
        ("mlm_mask_several_tiles",),
        ("address",),
    ),
)


def _seen(kind: str):
    return [pytest.param(bug, id=bug.name) for bug in BUGS if kind in bug.by]


@pytest.mark.parametrize("bug", _seen("values"))
def test_values_show_it(bug):
    kernels = cuda_emulation.kernels(patches=bug.patch)
    with pytest.raises(AssertionError):
        for name in bug.checks:
            CHECKS[name](kernels)


@pytest.mark.parametrize("bug", _seen("rules"))
def test_the_emulator_reports_it(bug):
    kernels = cuda_emulation.kernels(patches=bug.patch)
    with pytest.raises(RuntimeError, match=r"barrier|exchange|deadlock"):
        for name in bug.checks:
            CHECKS[name](kernels)


@functools.cache
def _reports(sanitizer: str) -> dict[str, str]:
    """What a sanitizer says of each bug that it should see, from one process."""
    bugs = [bug for bug in BUGS if sanitizer in bug.by]
    jobs = [sanitized.Job(bug.name, list(bug.checks), bug.patch) for bug in bugs]
    run = sanitized.run_checks(sanitizer, jobs, go_on=True)
    sections = run.stdout.split("== ")[1:]
    assert sections[-1].startswith("finished"), run.stdout[-8000:]
    return {section.split("\n", 1)[0]: section for section in sections}


@pytest.mark.parametrize(
    "sanitizer, bug",
    [pytest.param(s, *p.values, id=f"{s}-{p.id}") for s in ("address", "thread") for p in _seen(s)],
)
def test_a_sanitizer_reports_it(sanitizer, bug):
    if sanitized.runtime(sanitizer) is None:
        pytest.skip(f"{cuda_emulation.compiler()} comes without the {sanitizer} sanitizer")
    report = _reports(sanitizer)[bug.name]
    assert any(sign in report for sign in sanitized.SIGNS[sanitizer]), report[-4000:]
