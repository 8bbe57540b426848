#pragma once
#include "common/isa.h"
#include "common/types.h"
#include "preference/pair_outputs.h"

namespace apt {

// Everything is [pairs], contiguous. Rewards and outputs are float, or double for float64 inputs.
struct DpoLoss {
  DType dtype;
  DpoLossType type;
  const void *policy_chosen, *policy_rejected;
  const void *ref_chosen, *ref_rejected;  // null: a reference of 0
  double beta, label_smoothing, extra;    // extra: discopop's tau, simpo's gamma
  void *chosen_rewards, *rejected_rewards;
  PairOutputs out;
};

}  // namespace apt

APT_DECLARE_KERNEL(void, dpo_loss_fwd, const apt::DpoLoss&)
