#include "bindings/policy/policy_options.h"
#include "bindings/policy/token_loss.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_fwd_cpu(
    const Tensor& logps, const OptionalTensor& old_logps, const Tensor& advantages,
    const Tensor& mask, const OptionalTensor& rollout_weights, const OptionalTensor& ref_logps,
    const OptionalTensor& entropy, const OptionalTensor& normalizer, int64_t loss_type,
    int64_t ratio_level, int64_t kl_estimator, int64_t aggregation, double clip_low,
    double clip_high, double dual_clip, double sapo_temperature_pos, double sapo_temperature_neg,
    double kl_coef, double entropy_coef, bool need_entropy) {
  const ScalarType type = accumulate_type(logps);
  const Tensor loss = empty({}, type), metrics = empty({kPolicyMetrics}, type);
  const Tensor grad_logps = empty_large(logps.sizes(), type);
  const Tensor grad_entropy = need_entropy ? empty_large(logps.sizes(), type) : empty({0}, type);
  const Tensor scales = empty({logps.size(0), 1}, type);
  PolicyLoss a{};
  a.dtype = dtype_of(logps);
  a.options = policy_options(loss_type, ratio_level, kl_estimator, clip_low, clip_high, dual_clip,
                             sapo_temperature_pos, sapo_temperature_neg, kl_coef, entropy_coef);
  a.tokens = tokens_of(mask, aggregation, normalizer);
  a.logps = token_input(logps);
  a.old_logps = token_input(old_logps);
  a.advantages = token_input(advantages);
  a.rollout_weights = token_input(rollout_weights);
  a.ref_logps = token_input(ref_logps);
  a.entropy = token_input(entropy);
  a.loss = loss.mutable_data_ptr();
  a.metrics = metrics.mutable_data_ptr();
  a.grad_logps = grad_logps.mutable_data_ptr();
  a.scales = scales.mutable_data_ptr();
  a.grad_entropy = need_entropy ? grad_entropy.mutable_data_ptr() : nullptr;
  APT_CALL_KERNEL(policy_loss_fwd, a);
  return {loss, metrics, grad_logps, grad_entropy, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&policy_loss_fwd_cpu));
}

}  // namespace apt
