#pragma once
#include "apt/codes.h"
#include "common/isa.h"
#include "common/types.h"
#include "policy/token_inputs.h"

namespace apt {

constexpr int kPolicyMetrics = 7;

struct PolicyOptions {
  PolicyLossType type;
  KlEstimator kl_estimator;
  bool sequence_level;
  double clip_low, clip_high, dual_clip;  // dual_clip: infinity for none
  double sapo_temperature_pos, sapo_temperature_neg, kl_coef, entropy_coef;
};

struct PolicyLoss {
  DType dtype;  // of every floating input
  PolicyOptions options;
  Tokens tokens;
  TokenInput logps, old_logps, advantages, rollout_weights, ref_logps, entropy;
  // Float, or double for float64. loss: one; metrics: policy_loss, approx_kl, ppo_kl,
  // clip_fraction, dual_clip_fraction, ref_kl, entropy; grads [rows, length], of which each row
  // is still to be multiplied by its scale, grad_entropy or null
  void *loss, *metrics, *grad_logps, *grad_entropy, *scales;
};

}  // namespace apt

APT_DECLARE_KERNEL(void, policy_loss_fwd, const apt::PolicyLoss&)
