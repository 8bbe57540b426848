// What the bindings of losses of preference pairs share.
#pragma once
#include "bindings/common/operators.h"
#include "cpu/preference/pair_outputs.h"

namespace apt {

// The results of a loss of `pairs` pairs; reduction 0 none, 1 mean, 2 sum.
struct PairTensors {
  Tensor loss, grads;
  PairOutputs outputs;
  PairTensors(int64_t pairs, int64_t reduction, ScalarType type)
      : loss(reduction == 0 ? empty({pairs}, type) : empty({}, type)),
        grads(empty({2, pairs}, type)),
        outputs{pairs, Reduction(reduction), loss.mutable_data_ptr(), grads.mutable_data_ptr()} {
    APT_CHECK_VALUE(reduction >= 0 && reduction <= 2, "reduction: expected 0 to 2");
  }
};

}  // namespace apt
