#include "cpu/policy/gae.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

// Packed sequences: offsets from 0 to the end, never falling; a kernel trusts them.
void check_offsets(const Tensor& cu_seqlens, int64_t length) {
  const int64_t* offsets = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t last = cu_seqlens.size(0) - 1;
  APT_CHECK_VALUE(offsets[0] == 0 && offsets[last] == length,
                  "cu_seqlens: expected to begin with 0 and to end with ", length, ", got ",
                  offsets[0], " and ", offsets[last]);
  for (int64_t i = 0; i < last; ++i)
    APT_CHECK_VALUE(offsets[i] <= offsets[i + 1], "cu_seqlens: expected offsets that never fall");
}

GaeInput input(const OptionalTensor& t, bool time_major) {
  if (!t.has_value()) return {};
  if (t->dim() == 1) return {t->const_data_ptr(), t->stride(0), t->stride(0)};
  return {t->const_data_ptr(), t->stride(time_major ? 1 : 0), t->stride(time_major ? 0 : 1)};
}

std::tuple<Tensor, Tensor> gae_fwd_cpu(const Tensor& rewards, const Tensor& values,
                                       const OptionalTensor& mask, const OptionalTensor& terminated,
                                       const OptionalTensor& truncated,
                                       const OptionalTensor& bootstrap,
                                       const OptionalTensor& cu_seqlens, double gamma,
                                       double gae_lambda, bool whiten, bool time_major) {
  const ScalarType type = accumulate_type(rewards);
  const Tensor advantages = empty_large(rewards.sizes(), type);
  const Tensor returns = empty_large(rewards.sizes(), type);
  Gae a{};
  a.dtype = dtype_of(rewards);
  if (cu_seqlens.has_value()) {
    a.rows = cu_seqlens->size(0) - 1;
    a.length = rewards.size(0);
    check_offsets(*cu_seqlens, a.length);
    a.cu_seqlens = cu_seqlens->const_data_ptr<int64_t>();
    a.out_step = 1;
  } else {
    a.rows = rewards.size(time_major ? 1 : 0);
    a.length = rewards.size(time_major ? 0 : 1);
    a.out_row = time_major ? 1 : a.length;
    a.out_step = time_major ? a.rows : 1;
  }
  a.rewards = input(rewards, time_major);
  a.values = input(values, time_major);
  a.mask = input(mask, time_major);
  a.terminated = input(terminated, time_major);
  a.truncated = input(truncated, time_major);
  a.bootstrap = input(bootstrap, time_major);
  a.bootstrap_per_step =
      bootstrap.has_value() &&
      (cu_seqlens.has_value() ? bootstrap->size(0) != a.rows : bootstrap->dim() == 2);
  a.gamma = gamma;
  a.gae_lambda = gae_lambda;
  a.whiten = whiten;
  OptionalTensor flat_mask;
  if (whiten && mask.has_value()) flat_mask = contiguous(*mask);
  a.flat_mask = optional_data<bool>(flat_mask);
  a.advantages = advantages.mutable_data_ptr();
  a.returns = returns.mutable_data_ptr();
  APT_CALL_KERNEL(gae_fwd, a);
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("gae_fwd", TORCH_BOX(&gae_fwd_cpu)); }

}  // namespace apt
