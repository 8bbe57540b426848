#include "cpu/policy/group_advantages.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

Tensor group_advantages_fwd_cpu(const Tensor& rewards, int64_t group_size, int64_t kind,
                                double eps) {
  APT_CHECK_VALUE(kind >= 0 && kind <= 3, "kind: expected 0 to 3");
  APT_CHECK_VALUE(group_size > 0 && rewards.numel() % group_size == 0,
                  "group_size: expected a divisor of the number of rewards");
  const Tensor advantages = empty(rewards.sizes(), accumulate_type(rewards));
  APT_CALL_KERNEL(group_advantages_fwd,
                  {dtype_of(rewards), GroupAdvantageKind(kind), rewards.numel() / group_size,
                   group_size, eps, rewards.const_data_ptr(), advantages.mutable_data_ptr()});
  return advantages;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("group_advantages_fwd", TORCH_BOX(&group_advantages_fwd_cpu));
}

}  // namespace apt
