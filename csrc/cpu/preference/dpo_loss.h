#pragma once
#include "common/isa.h"
#include "common/types.h"
#include "preference/pair_outputs.h"

namespace apt {

// The order is that of the operator's argument `loss_type`.
enum class DpoType {
  sigmoid,
  robust,
  hinge,
  ipo,
  exo_pair,
  nca_pair,
  bco_pair,
  sppo_hard,
  apo_zero,
  apo_down,
  discopop,
  simpo,
  orpo,
};
constexpr int kDpoTypes = 13;

// Everything is [pairs], contiguous. Rewards and outputs are float, or double for float64 inputs.
struct DpoLoss {
  DType dtype;
  DpoType type;
  const void *policy_chosen, *policy_rejected;
  const void *ref_chosen, *ref_rejected;  // null: a reference of 0
  double beta, label_smoothing, extra;    // extra: discopop's tau, simpo's gamma
  void *chosen_rewards, *rejected_rewards;
  PairOutputs out;
};

}  // namespace apt

APT_DECLARE_KERNEL(void, dpo_loss_fwd, const apt::DpoLoss&)
