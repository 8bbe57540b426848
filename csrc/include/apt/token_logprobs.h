// CUDA launchers of token_logprobs: the log-softmax gathered at tokens, and the entropy.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "apt/dtype.h"

namespace apt::cuda {

// Logits (A, B, V): row (a, b) begins at element a * stride_a + b * stride_b and is contiguous.
// softmax is taken of z = cap(x) / temperature, cap(x) = softcap * tanh(x / softcap), cap(-inf) =
// -inf. V and A * B are below 2^31 - 2^20; strides and offsets are 64-bit.
struct LogitsRows {
  const void* data;
  DType dtype;
  int64_t A, B, V;
  int64_t stride_a, stride_b;
  const bool* mask;           // (A, B) or null; rows where it is false are never read
  const float* temperatures;  // (A, B) or null: then `temperature`
  float temperature;
  float softcap;  // 0: none
};

// logps (A, B, K) = z[id] - lse, entropy (A, B) or null, lse (A, B): in its 8 bytes the floats
// max cap(x) and log of the sum of e^(z - max z), as one number would lose that beside large
// logits. 0 in masked rows; NaN at an unmasked id outside [0, V).
cudaError_t token_logprobs_fwd(const LogitsRows& logits, const int64_t* token_ids, int64_t K,
                               float* logps, float* entropy, double* lse, cudaStream_t stream);

// grad_logits (A, B, V), contiguous, of the logits' dtype; 0 in masked rows. grad_entropy may be
// null, entropy then too. An id outside [0, V) adds nothing.
cudaError_t token_logprobs_bwd(const float* grad_logps, const float* grad_entropy,
                               const LogitsRows& logits, const int64_t* token_ids, int64_t K,
                               const double* lse, const float* entropy, void* grad_logits,
                               cudaStream_t stream);

}  // namespace apt::cuda
