#pragma once
#include "common/isa.h"
#include "common/types.h"
#include "policy/token_inputs.h"

namespace apt {

struct ValueLoss {
  DType dtype;  // of every floating input
  Tokens tokens;
  TokenInput values, returns, old_values;  // old_values: null where nothing is clipped
  double clip_range;
  // Float, or double for float64. loss: one; metrics: clip_fraction, explained_variance
  void *loss, *metrics, *grad_values, *scales;  // the gradient is grad_values times the row's scale
};

}  // namespace apt

APT_DECLARE_KERNEL(void, value_loss_fwd, const apt::ValueLoss&)
