#pragma once
#include <cstdint>

#include "apt/codes.h"
#include "common/isa.h"
#include "common/types.h"

namespace apt {

struct GroupAdvantages {
  DType dtype;
  GroupAdvantageKind kind;
  int64_t groups, group_size;
  double eps;
  const void* rewards;  // [groups, group_size], contiguous
  void* advantages;     // the same, float, or double for float64
};

}  // namespace apt

APT_DECLARE_KERNEL(void, group_advantages_fwd, const apt::GroupAdvantages&)
