#pragma once
#include "bindings/common/operators.h"
#include "cpu/head/head.h"

namespace apt {

inline LinearHead linear_head(const Tensor& hidden, const Tensor& weight,
                              const OptionalTensor& bias, double softcap, double logit_scale) {
  LinearHead head{};
  head.dtype = dtype_of(hidden);
  head.rows = hidden.size(0);
  head.features = hidden.size(1);
  head.vocab = weight.size(0);
  head.hidden = hidden.const_data_ptr();
  head.weight = weight.const_data_ptr();
  head.bias = optional_data(bias);
  head.logit_scale = logit_scale;
  head.softcap = softcap;
  return head;
}

// Results of the gradients that are needed; the others are empty tensors.
struct HeadGradientTensors {
  Tensor hidden, weight, bias;
  HeadGradientTensors(LinearHead& head, ScalarType type, bool need_hidden, bool need_weight,
                      bool need_bias)
      : hidden(result({head.rows, head.features}, type, need_hidden, head.grad_hidden)),
        weight(result({head.vocab, head.features}, type, need_weight, head.grad_weight)),
        bias(result({head.vocab}, type, need_bias, head.grad_bias)) {}

 private:
  static Tensor result(Sizes sizes, ScalarType type, bool needed, void*& data) {
    if (!needed) return empty({0}, type);
    Tensor t = empty_large(sizes, type);
    data = t.mutable_data_ptr();
    return t;
  }
};

}  // namespace apt
