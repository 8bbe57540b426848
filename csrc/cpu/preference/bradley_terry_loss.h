#pragma once
#include "common/isa.h"
#include "common/types.h"
#include "preference/pair_outputs.h"

namespace apt {

// Everything is [pairs], contiguous. Margins and outputs are float, or double for float64 rewards.
struct BradleyTerryLoss {
  DType dtype;
  const void *chosen, *rejected;
  const void* margins;  // null: `margin` for all pairs
  double margin, center_coef;
  PairOutputs out;
};

}  // namespace apt

APT_DECLARE_KERNEL(void, bradley_terry_loss_fwd, const apt::BradleyTerryLoss&)
