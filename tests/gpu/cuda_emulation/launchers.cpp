// The launchers of csrc/include/apt as C functions, which ctypes can call.
#include "apt/bradley_terry_loss.h"
#include "apt/dpo_loss.h"
#include "apt/token_logprobs.h"

namespace cuda = apt::cuda;

extern "C" {

int token_logprobs_fwd(const cuda::LogitsRows* logits, const int64_t* token_ids, int64_t K,
                       float* logps, float* entropy, double* lse) {
  return cuda::token_logprobs_fwd(*logits, token_ids, K, logps, entropy, lse, nullptr);
}

int token_logprobs_bwd(const float* grad_logps, const float* grad_entropy,
                       const cuda::LogitsRows* logits, const int64_t* token_ids, int64_t K,
                       const double* lse, const float* entropy, void* grad_logits) {
  return cuda::token_logprobs_bwd(grad_logps, grad_entropy, *logits, token_ids, K, lse, entropy,
                                  grad_logits, nullptr);
}

int64_t pair_loss_workspace(int64_t pairs, int reduction) {
  return cuda::pair_loss_workspace(pairs, static_cast<cuda::Reduction>(reduction));
}

int dpo_loss_fwd(const void* policy_chosen, const void* policy_rejected, const void* ref_chosen,
                 const void* ref_rejected, int dtype, int64_t B, int loss_type, int reduction,
                 double beta, double label_smoothing, double extra, float* loss,
                 float* chosen_rewards, float* rejected_rewards, float* grads, float* workspace) {
  const cuda::DpoOptions options = {static_cast<cuda::DpoLossType>(loss_type),
                                    static_cast<cuda::Reduction>(reduction), beta, label_smoothing,
                                    extra};
  return cuda::dpo_loss_fwd(policy_chosen, policy_rejected, ref_chosen, ref_rejected,
                            static_cast<cuda::DType>(dtype), B, options, loss, chosen_rewards,
                            rejected_rewards, grads, workspace, nullptr);
}

int bradley_terry_loss_fwd(const void* chosen, const void* rejected, int dtype,
                           const float* margins, int64_t B, double margin, double center_coef,
                           int reduction, float* loss, float* grads, float* workspace) {
  return cuda::bradley_terry_loss_fwd(chosen, rejected, static_cast<cuda::DType>(dtype), margins, B,
                                      margin, center_coef, static_cast<cuda::Reduction>(reduction),
                                      loss, grads, workspace, nullptr);
}

}  // extern "C"
