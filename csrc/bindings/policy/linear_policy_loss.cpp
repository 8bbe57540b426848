#include "cpu/policy/linear_policy_loss.h"

#include "bindings/head/head.h"
#include "bindings/policy/policy_options.h"
#include "bindings/policy/token_loss.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_policy_loss_fwd_cpu(
    const OptionalTensor& upstream, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const Tensor& token_ids, const Tensor& mask,
    const OptionalTensor& temperature_tensor, const OptionalTensor& old_logps,
    const Tensor& advantages, const OptionalTensor& rollout_weights,
    const OptionalTensor& ref_logps, const OptionalTensor& normalizer, double temperature,
    double softcap, double logit_scale, int64_t loss_type, int64_t ratio_level,
    int64_t kl_estimator, int64_t aggregation, double clip_low, double clip_high, double dual_clip,
    double sapo_temperature_pos, double sapo_temperature_neg, double kl_coef, double entropy_coef,
    bool need_hidden, bool need_weight, bool need_bias) {
  const ScalarType type = accumulate_type(hidden);
  const Tensor loss = empty({}, type), metrics = empty({kPolicyMetrics}, type);
  LinearPolicyLoss a{};
  a.head = linear_head(hidden, weight, bias, softcap, logit_scale);
  const HeadGradientTensors grad(a.head, hidden.scalar_type(), need_hidden, need_weight, need_bias);
  a.token_ids = token_ids.const_data_ptr<int64_t>();
  a.temperature_tensor = row_temperatures(temperature_tensor, mask);
  a.temperature = temperature;
  a.upstream = upstream.has_value() ? number(*upstream) : 1;
  a.options = policy_options(loss_type, ratio_level, kl_estimator, clip_low, clip_high, dual_clip,
                             sapo_temperature_pos, sapo_temperature_neg, kl_coef, entropy_coef);
  a.tokens = tokens_of(mask, aggregation, normalizer);
  a.old_logps = token_input(old_logps);
  a.advantages = token_input(advantages);
  a.rollout_weights = token_input(rollout_weights);
  a.ref_logps = token_input(ref_logps);
  a.loss = loss.mutable_data_ptr();
  a.metrics = metrics.mutable_data_ptr();
  const int64_t bad = APT_CALL_KERNEL(linear_policy_loss_fwd, a);
  APT_CHECK_VALUE(bad < 0, "token_ids: expected ids in [0, ", a.head.vocab,
                  ") where the mask counts, got ", a.token_ids[std::max<int64_t>(bad, 0)],
                  " in row ", bad, mask_hint(a.token_ids[std::max<int64_t>(bad, 0)]));
  return {loss, metrics, grad.hidden, grad.weight, grad.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) {
  m.impl("linear_policy_loss_fwd", TORCH_BOX(&linear_policy_loss_fwd_cpu));
}

}  // namespace apt
