#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// Rows of logits [outer, inner, vocab] with any strides of outer and inner (in elements) and unit
// stride along the vocabulary; everything else is contiguous. Floating scalars are float, or
// double where the logits are.
struct TokenLogprobs {
  DType dtype;
  int64_t outer, inner, vocab, ids_per_row, outer_stride, inner_stride;
  const void* logits;
  const int64_t* token_ids;     // [outer, inner, ids_per_row]
  const bool* mask;             // [outer, inner] or null: true counts
  const void* temperatures;     // [outer, inner] or null
  double temperature, softcap;  // softcap 0: none
  bool return_entropy;
  void *logps, *entropy;  // written by fwd; entropy is read by bwd
  double* lse;            // written by fwd, read by bwd: of floats a pair of them, not a number
  const void *grad_logps, *grad_entropy;
  void* grad_logits;  // [outer, inner, vocab] contiguous
};

}  // namespace apt

// fwd returns the index in token_ids of an unmasked id outside the vocabulary, or -1.
APT_DECLARE_KERNEL(int64_t, token_logprobs_fwd, const apt::TokenLogprobs&)
APT_DECLARE_KERNEL(void, token_logprobs_bwd, const apt::TokenLogprobs&)
