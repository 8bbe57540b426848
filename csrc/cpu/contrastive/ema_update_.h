#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

struct EmaTensor {
  void* target;
  const void* source;
  int64_t count;
};

// Pairs of one dtype each: float64 with float64, or any of the others. No target comes twice.
struct EmaUpdate {
  DType target_dtype, source_dtype;
  const EmaTensor* tensors;
  int64_t tensor_count;
  double weight;  // 1 - momentum
};

}  // namespace apt

APT_DECLARE_KERNEL(void, ema_update_fwd, const apt::EmaUpdate&)
