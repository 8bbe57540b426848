// The launchers of csrc/include/apt as C functions, which ctypes can call.
#include "apt/bradley_terry_loss.h"
#include "apt/dpo_loss.h"
#include "apt/gae.h"
#include "apt/mlm_mask.h"
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
  return cuda::pair_loss_workspace(pairs, static_cast<apt::Reduction>(reduction));
}

int dpo_loss_fwd(const void* policy_chosen, const void* policy_rejected, const void* ref_chosen,
                 const void* ref_rejected, int dtype, int64_t B, int loss_type, int reduction,
                 double beta, double label_smoothing, double extra, float* loss,
                 float* chosen_rewards, float* rejected_rewards, float* grads, float* workspace) {
  const cuda::DpoOptions options = {static_cast<apt::DpoLossType>(loss_type),
                                    static_cast<apt::Reduction>(reduction), beta, label_smoothing,
                                    extra};
  return cuda::dpo_loss_fwd(policy_chosen, policy_rejected, ref_chosen, ref_rejected,
                            static_cast<cuda::DType>(dtype), B, options, loss, chosen_rewards,
                            rejected_rewards, grads, workspace, nullptr);
}

int bradley_terry_loss_fwd(const void* chosen, const void* rejected, int dtype,
                           const float* margins, int64_t B, double margin, double center_coef,
                           int reduction, float* loss, float* grads, float* workspace) {
  return cuda::bradley_terry_loss_fwd(chosen, rejected, static_cast<cuda::DType>(dtype), margins, B,
                                      margin, center_coef, static_cast<apt::Reduction>(reduction),
                                      loss, grads, workspace, nullptr);
}

// inputs: pointers of rewards, values, mask, terminated, truncated and bootstrap, with two strides
// each; outputs: advantages, returns, cu_seqlens, the mask for whitening, workspace. numbers:
// dtype, rows, length, bootstrap_per_step, both strides of the results.
int gae_fwd(void* const* inputs, const int64_t* strides, void* const* outputs,
            const int64_t* numbers, double gamma, double gae_lambda) {
  const auto input = [&](int i) {
    return cuda::GaeInput{inputs[i], strides[2 * i], strides[2 * i + 1]};
  };
  cuda::Gae a = {};
  a.dtype = static_cast<cuda::DType>(numbers[0]);
  a.rows = numbers[1];
  a.length = numbers[2];
  a.rewards = input(0);
  a.values = input(1);
  a.mask = input(2);
  a.terminated = input(3);
  a.truncated = input(4);
  a.bootstrap = input(5);
  a.bootstrap_per_step = numbers[3] != 0;
  a.gamma = static_cast<float>(gamma);
  a.decay = static_cast<float>(gamma * gae_lambda);
  a.out_row_stride = numbers[4];
  a.out_step_stride = numbers[5];
  a.advantages = static_cast<float*>(outputs[0]);
  a.returns = static_cast<float*>(outputs[1]);
  a.cu_seqlens = static_cast<const int64_t*>(outputs[2]);
  a.flat_mask = static_cast<const bool*>(outputs[3]);
  a.workspace = static_cast<double*>(outputs[4]);
  return cuda::gae_fwd(a, nullptr);
}

// tensors: ids, attention mask, special tokens mask, samples, words, masked ids, labels, positions.
// numbers: rows, length, the bytes of an id and of both masks, mask_token_id, word_count, the three
// thresholds, seed low and high, step, at_least_one.
int mlm_mask_fwd(void* const* tensors, const int64_t* numbers, const int64_t* runs,
                 int64_t run_count) {
  cuda::MlmMask a = {};
  a.rows = numbers[0];
  a.length = numbers[1];
  a.id_bytes = static_cast<int>(numbers[2]);
  a.input_ids = tensors[0];
  a.attention_mask = {tensors[1], static_cast<int>(numbers[3])};
  a.special_tokens_mask = {tensors[2], static_cast<int>(numbers[4])};
  a.sample_ids = static_cast<const int64_t*>(tensors[3]);
  a.word_ids = static_cast<const int64_t*>(tensors[4]);
  a.special_runs.count = static_cast<int>(run_count);
  for (int64_t r = 0; r < run_count && r < cuda::kMaxSpecialRuns; ++r) {
    a.special_runs.first[r] = static_cast<int>(runs[2 * r]);
    a.special_runs.size[r] = static_cast<int>(runs[2 * r + 1]);
  }
  a.mask_token_id = static_cast<int>(numbers[5]);
  a.word_count = static_cast<uint32_t>(numbers[6]);
  a.chosen_below = numbers[7];
  a.mask_below = numbers[8];
  a.random_below = numbers[9];
  a.seed_low = static_cast<uint32_t>(numbers[10]);
  a.seed_high = static_cast<uint32_t>(numbers[11]);
  a.step = static_cast<uint32_t>(numbers[12]);
  a.at_least_one = numbers[13] != 0;
  a.masked_ids = tensors[5];
  a.labels = tensors[6];
  a.mask_positions = static_cast<bool*>(tensors[7]);
  return cuda::mlm_mask_fwd(a, nullptr);
}

}  // extern "C"
