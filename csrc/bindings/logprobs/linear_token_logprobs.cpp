#include "cpu/logprobs/linear_token_logprobs.h"

#include "bindings/head/head.h"

namespace apt {
namespace {

LinearTokenLogprobs arguments(const Tensor& hidden, const Tensor& weight,
                              const OptionalTensor& bias, const Tensor& token_ids,
                              const OptionalTensor& mask, const OptionalTensor& temperatures,
                              double temperature, double softcap, double logit_scale) {
  LinearTokenLogprobs a{};
  a.head = linear_head(hidden, weight, bias, softcap, logit_scale);
  a.token_ids = token_ids.const_data_ptr<int64_t>();
  a.mask = optional_data<bool>(mask);
  a.temperatures = row_temperatures(temperatures, mask);
  a.temperature = temperature;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_token_logprobs_fwd_cpu(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& token_ids,
    const OptionalTensor& mask, const OptionalTensor& temperatures, double temperature,
    double softcap, double logit_scale, bool return_entropy, bool form_grad_hidden) {
  STD_TORCH_CHECK(!(return_entropy && form_grad_hidden), "form_grad_hidden excludes the entropy");
  const ScalarType type = accumulate_type(hidden);
  LinearTokenLogprobs a = arguments(hidden, weight, bias, token_ids, mask, temperatures,
                                    temperature, softcap, logit_scale);
  const Tensor logps = empty({a.head.rows}, type);
  const Tensor lse = empty({a.head.rows}, ScalarType::Double);
  const Tensor entropy = empty({return_entropy ? a.head.rows : 0}, type);
  const HeadGradientTensors grad(a.head, hidden.scalar_type(), form_grad_hidden, false, false);
  a.return_entropy = return_entropy;
  a.logps = logps.mutable_data_ptr();
  a.entropy = entropy.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<double>();
  const int64_t bad = APT_CALL_KERNEL(linear_token_logprobs_fwd, a);
  APT_CHECK_VALUE(bad < 0, "token_ids: expected ids in [0, ", a.head.vocab,
                  ") where the mask counts, got ", a.token_ids[std::max<int64_t>(bad, 0)],
                  " in row ", bad, mask_hint(a.token_ids[std::max<int64_t>(bad, 0)]));
  return {logps, entropy, lse, grad.hidden};
}

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_bwd_cpu(
    const Tensor& grad_logps, const OptionalTensor& grad_entropy, const Tensor& hidden,
    const Tensor& weight, const OptionalTensor& bias, const Tensor& token_ids,
    const OptionalTensor& mask, const OptionalTensor& temperatures, const Tensor& lse,
    const Tensor& entropy, double temperature, double softcap, double logit_scale, bool need_hidden,
    bool need_weight, bool need_bias) {
  LinearTokenLogprobs a = arguments(hidden, weight, bias, token_ids, mask, temperatures,
                                    temperature, softcap, logit_scale);
  const HeadGradientTensors grad(a.head, hidden.scalar_type(), need_hidden, need_weight, need_bias);
  a.lse = const_cast<double*>(lse.const_data_ptr<double>());
  a.entropy = const_cast<void*>(entropy.const_data_ptr());
  a.grad_logps = grad_logps.const_data_ptr();
  a.grad_entropy = optional_data(grad_entropy);
  APT_CALL_KERNEL(linear_token_logprobs_bwd, a);
  return {grad.hidden, grad.weight, grad.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("linear_token_logprobs_fwd", TORCH_BOX(&linear_token_logprobs_fwd_cpu));
  m.impl("linear_token_logprobs_bwd", TORCH_BOX(&linear_token_logprobs_bwd_cpu));
}

}  // namespace apt
