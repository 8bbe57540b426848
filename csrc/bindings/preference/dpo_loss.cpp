#include "cpu/preference/dpo_loss.h"

#include "bindings/preference/pair_loss.h"

namespace apt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dpo_loss_fwd_cpu(
    const Tensor& policy_chosen, const Tensor& policy_rejected, const OptionalTensor& ref_chosen,
    const OptionalTensor& ref_rejected, int64_t loss_type, int64_t reduction, double beta,
    double label_smoothing, double discopop_tau, double simpo_gamma) {
  APT_CHECK_VALUE(loss_type >= 0 && loss_type < kDpoLossTypes, "loss_type: expected 0 to ",
                  kDpoLossTypes - 1);
  const double extra = DpoLossType(loss_type) == DpoLossType::discopop ? discopop_tau
                       : DpoLossType(loss_type) == DpoLossType::simpo  ? simpo_gamma
                                                                       : 0.0;
  const ScalarType type = accumulate_type(policy_chosen);
  const int64_t pairs = policy_chosen.size(0);
  const PairTensors results(pairs, reduction, type);
  const Tensor chosen_rewards = empty({pairs}, type);
  const Tensor rejected_rewards = empty({pairs}, type);
  APT_CALL_KERNEL(dpo_loss_fwd, {dtype_of(policy_chosen), DpoLossType(loss_type),
                                 policy_chosen.const_data_ptr(), policy_rejected.const_data_ptr(),
                                 optional_data(ref_chosen), optional_data(ref_rejected), beta,
                                 label_smoothing, extra, chosen_rewards.mutable_data_ptr(),
                                 rejected_rewards.mutable_data_ptr(), results.outputs});
  return {results.loss, chosen_rewards, rejected_rewards, results.grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(apt, CPU, m) { m.impl("dpo_loss_fwd", TORCH_BOX(&dpo_loss_fwd_cpu)); }

}  // namespace apt
