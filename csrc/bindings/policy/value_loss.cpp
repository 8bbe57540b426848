#include "cpu/policy/value_loss.h"

#include "bindings/policy/token_loss.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_fwd_cpu(
    const Tensor& values, const Tensor& returns, const Tensor& mask,
    const OptionalTensor& old_values, const OptionalTensor& normalizer, int64_t aggregation,
    double clip_range) {
  const ScalarType type = accumulate_type(values);
  const Tensor loss = empty({}, type), metrics = empty({2}, type);
  const Tensor grad_values = empty_large(values.sizes(), type);
  const Tensor scales = empty({values.size(0), 1}, type);
  ValueLoss a{};
  a.dtype = dtype_of(values);
  a.tokens = tokens_of(mask, aggregation, normalizer);
  a.values = token_input(values);
  a.returns = token_input(returns);
  a.old_values = token_input(old_values);
  a.clip_range = clip_range;
  a.loss = loss.mutable_data_ptr();
  a.metrics = metrics.mutable_data_ptr();
  a.grad_values = grad_values.mutable_data_ptr();
  a.scales = scales.mutable_data_ptr();
  APT_CALL_KERNEL(value_loss_fwd, a);
  return {loss, metrics, grad_values, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("value_loss_fwd", TORCH_BOX(&value_loss_fwd_cpu)); }

}  // namespace apt
