// What the bindings of the losses of policy optimisation share.
#pragma once
#include "bindings/common/operators.h"
#include "cpu/policy/policy_loss.h"

namespace apt {

inline PolicyOptions policy_options(int64_t loss_type, int64_t ratio_level, int64_t kl_estimator,
                                    double clip_low, double clip_high, double dual_clip,
                                    double sapo_temperature_pos, double sapo_temperature_neg,
                                    double kl_coef, double entropy_coef) {
  APT_CHECK_VALUE(loss_type >= 0 && loss_type <= 3, "loss_type: expected 0 to 3");
  APT_CHECK_VALUE(kl_estimator >= 1 && kl_estimator <= 4, "kl_estimator: expected 1 to 4");
  return {PolicyLossType(loss_type),
          KlEstimator(kl_estimator),
          RatioLevel(ratio_level) == RatioLevel::sequence,
          clip_low,
          clip_high,
          dual_clip,
          sapo_temperature_pos,
          sapo_temperature_neg,
          kl_coef,
          entropy_coef};
}

}  // namespace apt
