#include "cpu/policy/kl_penalty.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

Tensor run(const OptionalTensor& grad, const Tensor& logps, const Tensor& ref_logps,
           const OptionalTensor& mask, int64_t estimator) {
  APT_CHECK_VALUE(estimator >= 1 && estimator <= 3, "estimator: expected 1 to 3");
  const Tensor out = empty_large(logps.sizes(), accumulate_type(logps));
  APT_CALL_KERNEL(kl_penalty,
                  {dtype_of(logps), KlEstimator(estimator), logps.numel(), logps.const_data_ptr(),
                   ref_logps.const_data_ptr(), optional_data<bool>(mask), optional_data(grad),
                   out.mutable_data_ptr()});
  return out;
}

Tensor kl_penalty_fwd_cpu(const Tensor& logps, const Tensor& ref_logps, const OptionalTensor& mask,
                          int64_t estimator) {
  return run({}, logps, ref_logps, mask, estimator);
}

Tensor kl_penalty_bwd_cpu(const Tensor& grad, const Tensor& logps, const Tensor& ref_logps,
                          const OptionalTensor& mask, int64_t estimator) {
  return run(grad, logps, ref_logps, mask, estimator);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("kl_penalty_fwd", TORCH_BOX(&kl_penalty_fwd_cpu));
  m.impl("kl_penalty_bwd", TORCH_BOX(&kl_penalty_bwd_cpu));
}

}  // namespace apt
