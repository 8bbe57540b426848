#include "cpu/logprobs/token_logprobs.h"

#include "bindings/common/operators.h"

namespace apt {
namespace {

TokenLogprobs arguments(const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask,
                        const OptionalTensor& temperatures, double temperature, double softcap) {
  TokenLogprobs a{};
  a.dtype = dtype_of(logits);
  a.outer = logits.size(0);
  a.inner = logits.size(1);
  a.vocab = logits.size(2);
  a.outer_stride = logits.stride(0);
  a.inner_stride = logits.stride(1);
  a.ids_per_row = token_ids.size(2);
  a.logits = logits.const_data_ptr();
  a.token_ids = token_ids.const_data_ptr<int64_t>();
  a.mask = optional_data<bool>(mask);
  a.temperatures = row_temperatures(temperatures, mask);
  a.temperature = temperature;
  a.softcap = softcap;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_fwd_cpu(
    const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask,
    const OptionalTensor& temperatures, double temperature, double softcap, bool return_entropy) {
  const ScalarType type = accumulate_type(logits);
  const Tensor logps = empty(token_ids.sizes(), type);
  const Tensor lse = empty({logits.size(0), logits.size(1)}, ScalarType::Double);
  const Tensor entropy = return_entropy ? empty(lse.sizes(), type) : empty({0}, type);
  TokenLogprobs a = arguments(logits, token_ids, mask, temperatures, temperature, softcap);
  a.return_entropy = return_entropy;
  a.logps = logps.mutable_data_ptr();
  a.entropy = entropy.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<double>();
  const int64_t bad = APT_CALL_KERNEL(token_logprobs_fwd, a);
  APT_CHECK_VALUE(bad < 0, "token_ids: expected ids in [0, ", a.vocab,
                  ") where the mask counts, got ", a.token_ids[std::max<int64_t>(bad, 0)],
                  " in row ", bad / std::max<int64_t>(a.ids_per_row, 1),
                  mask_hint(a.token_ids[std::max<int64_t>(bad, 0)]));
  return {logps, entropy, lse};
}

Tensor token_logprobs_bwd_cpu(const Tensor& grad_logps, const OptionalTensor& grad_entropy,
                              const Tensor& logits, const Tensor& token_ids,
                              const OptionalTensor& mask, const OptionalTensor& temperatures,
                              const Tensor& lse, const Tensor& entropy, double temperature,
                              double softcap) {
  const Tensor grad_logits = empty_large(logits.sizes(), logits.scalar_type());
  TokenLogprobs a = arguments(logits, token_ids, mask, temperatures, temperature, softcap);
  a.lse = const_cast<double*>(lse.const_data_ptr<double>());
  a.entropy = const_cast<void*>(entropy.const_data_ptr());
  a.grad_logps = grad_logps.const_data_ptr();
  a.grad_entropy = optional_data(grad_entropy);
  a.grad_logits = grad_logits.mutable_data_ptr();
  APT_CALL_KERNEL(token_logprobs_bwd, a);
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("token_logprobs_fwd", TORCH_BOX(&token_logprobs_fwd_cpu));
  m.impl("token_logprobs_bwd", TORCH_BOX(&token_logprobs_bwd_cpu));
}

}  // namespace apt
