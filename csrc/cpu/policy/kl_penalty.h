#pragma once
#include <cstdint>

#include "apt/codes.h"
#include "common/isa.h"
#include "common/types.h"

namespace apt {

// Everything is [size], contiguous.
struct KlPenalty {
  DType dtype;
  KlEstimator estimator;  // all but unbiased_k3
  int64_t size;
  const void *logps, *ref_logps;
  const bool* mask;  // null: all count
  const void* grad;  // float, or double for float64; null: `out` is the penalty, else its gradient
  void* out;         // as grad
};

}  // namespace apt

APT_DECLARE_KERNEL(void, kl_penalty, const apt::KlPenalty&)
