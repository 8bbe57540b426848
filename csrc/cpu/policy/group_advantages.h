#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// The order is that of the operator's argument `kind`.
enum class GroupAdvantage { relative, normalized, rank, leave_one_out };

struct GroupAdvantages {
  DType dtype;
  GroupAdvantage kind;
  int64_t groups, group_size;
  double eps;
  const void* rewards;  // [groups, group_size], contiguous
  void* advantages;     // the same, float, or double for float64
};

}  // namespace apt

APT_DECLARE_KERNEL(void, group_advantages_fwd, const apt::GroupAdvantages&)
