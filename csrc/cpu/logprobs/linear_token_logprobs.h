#pragma once
#include "head/head.h"

namespace apt {

// Everything is contiguous; floating scalars of a row are float, or double where hidden is.
struct LinearTokenLogprobs {
  LinearHead head;           // fwd: grad_hidden, if not null, receives d logps / d hidden
  const int64_t* token_ids;  // [rows]
  const bool* mask;          // [rows] or null: true counts
  const void* temperatures;  // [rows] or null
  double temperature;
  bool return_entropy;
  void *logps, *entropy;  // written by fwd; entropy is read by bwd
  double* lse;            // written by fwd, read by bwd
  const void *grad_logps, *grad_entropy;
};

}  // namespace apt

// fwd returns the row of an unmasked id outside the vocabulary, or -1.
APT_DECLARE_KERNEL(int64_t, linear_token_logprobs_fwd, const apt::LinearTokenLogprobs&)
APT_DECLARE_KERNEL(void, linear_token_logprobs_bwd, const apt::LinearTokenLogprobs&)
