// CUDA launcher of bradley_terry_loss: the loss of a reward model and its gradients.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "apt/dtype.h"
#include "apt/pair_loss.h"

namespace apt::cuda {

// chosen, rejected (B) of `dtype`; margins (B) or null: then `margin`. loss: (B) for none, else
// one float; grads (2, B). workspace: pair_loss_workspace(B, reduction) floats.
cudaError_t bradley_terry_loss_fwd(const void* chosen, const void* rejected, DType dtype,
                                   const float* margins, int64_t B, double margin,
                                   double center_coef, Reduction reduction, float* loss,
                                   float* grads, float* workspace, cudaStream_t stream);

}  // namespace apt::cuda
