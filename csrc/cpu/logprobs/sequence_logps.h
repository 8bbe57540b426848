#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// Rows of log-probabilities [rows, length] with any strides (in elements).
struct SequenceLogps {
  DType dtype;
  int64_t rows, length, row_stride, column_stride;
  const void* logps;
  const bool* mask;  // [rows, length] contiguous: true counts
  void* sums;        // [rows] float, or double for float64
  void* tokens;      // [rows], as sums: of how many, at least 1, they are means; or null: sums
  const void* grad;  // [rows], as sums
  void* grad_logps;  // [rows, length] contiguous, as sums
};

}  // namespace apt

APT_DECLARE_KERNEL(void, sequence_logps_fwd, const apt::SequenceLogps&)
APT_DECLARE_KERNEL(void, sequence_logps_bwd, const apt::SequenceLogps&)
