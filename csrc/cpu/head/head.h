#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// An output head, logits = logit_scale * (hidden weight^T + bias), and its gradients. All
// contiguous and of one dtype. A null gradient is not wanted, and no work is done for it.
struct LinearHead {
  DType dtype;
  int64_t rows, features, vocab;
  const void *hidden, *weight, *bias;  // [rows, features], [vocab, features], [vocab] or null
  double logit_scale, softcap;         // softcap 0: none
  void *grad_hidden, *grad_weight, *grad_bias;
};

}  // namespace apt
