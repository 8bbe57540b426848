#pragma once
#include "head/head.h"
#include "policy/policy_loss.h"

namespace apt {

// Tokens [rows, length] are the head's rows. Floating inputs of a token are float, or double where
// hidden is.
struct LinearPolicyLoss {
  LinearHead head;                 // gradients are those of upstream * loss
  const int64_t* token_ids;        // [head.rows]
  const void* temperature_tensor;  // [head.rows] or null
  double temperature, upstream;
  PolicyOptions options;
  Tokens tokens;
  TokenInput old_logps, advantages, rollout_weights, ref_logps;
  void *loss, *metrics;  // as of PolicyLoss
};

}  // namespace apt

// Returns the row of an id outside the vocabulary in a token that counts, or -1.
APT_DECLARE_KERNEL(int64_t, linear_policy_loss_fwd, const apt::LinearPolicyLoss&)
