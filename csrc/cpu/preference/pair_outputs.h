// What the bindings and the kernels of losses of preference pairs share.
#pragma once
#include <cstdint>

#include "apt/codes.h"

namespace apt {

// Where the results go: float, or double for float64 inputs.
struct PairOutputs {
  int64_t pairs;
  Reduction reduction;
  void* loss;   // [pairs] for none, else one number
  void* grads;  // [2, pairs]: d loss / d chosen, d loss / d rejected
};

}  // namespace apt
