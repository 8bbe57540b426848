// CUDA launcher of dpo_loss: the losses of preference pairs, their rewards and their gradients.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "apt/codes.h"
#include "apt/dtype.h"
#include "apt/pair_loss.h"

namespace apt::cuda {

struct DpoOptions {
  DpoLossType loss_type;
  Reduction reduction;
  double beta;
  double label_smoothing;
  double extra;  // discopop's tau, simpo's gamma
};

// policy_* and ref_* (B) of `dtype`, the ref_* both null for a reference of 0. loss: (B) for none,
// else one float; chosen_rewards, rejected_rewards (B); grads (2, B): d loss / d policy_chosen and
// d loss / d policy_rejected. workspace: pair_loss_workspace(B, reduction) floats.
cudaError_t dpo_loss_fwd(const void* policy_chosen, const void* policy_rejected,
                         const void* ref_chosen, const void* ref_rejected, DType dtype, int64_t B,
                         const DpoOptions& options, float* loss, float* chosen_rewards,
                         float* rejected_rewards, float* grads, float* workspace,
                         cudaStream_t stream);

}  // namespace apt::cuda
