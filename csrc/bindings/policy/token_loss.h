// What the bindings of losses of tokens share.
#pragma once
#include "bindings/common/operators.h"
#include "cpu/policy/token_inputs.h"

namespace apt {

// (B, T) with adjacent tokens, or (B): one number a row.
inline TokenInput token_input(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.dim() == 2 ? 1 : 0};
}
inline TokenInput token_input(const OptionalTensor& t) {
  return t.has_value() ? token_input(*t) : TokenInput{};
}

inline Tokens tokens_of(const Tensor& mask, int64_t aggregation, const OptionalTensor& normalizer) {
  APT_CHECK_VALUE(aggregation >= 0 && aggregation <= 4, "aggregation: expected 0 to 4");
  double divisor = 0;
  if (normalizer.has_value()) {
    divisor = number(*normalizer);
    APT_CHECK_VALUE(divisor > 0, "normalizer: expected a number above 0, got ", divisor);
  }
  return {mask.size(0),
          mask.size(1),
          mask.const_data_ptr<bool>(),
          mask.stride(0),
          Aggregation(aggregation),
          divisor};
}

}  // namespace apt
