// The kernel that every loss of preference pairs shares: a function of each pair, and its
// reduction.
#pragma once

#include "apt/pair_loss.h"
#include "common/common.cuh"

namespace apt::cuda {

constexpr int kPairThreads = 512;
constexpr int kPairWarps = kPairThreads / kWarpSize;
constexpr int64_t kOneBlockPairs = 16 * kPairThreads;  // up to here one block reduces alone
constexpr int64_t kMaxPairBlocks = kPairThreads;       // one partial sum a thread of the last block

int64_t pair_loss_blocks(int64_t pairs, Reduction reduction);

// A few pairs, as most batches are, take a few warps.
inline int pair_loss_threads(int64_t pairs) {
  const int64_t warps = (pairs + kWarpSize - 1) / kWarpSize;
  return kWarpSize * static_cast<int>(warps < 1 ? 1 : warps < kPairWarps ? warps : kPairWarps);
}

// What the loss of one pair gives.
struct PairResult {
  float loss;
  float grad_chosen;
  float grad_rejected;
};

__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));  // never overflows
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

__device__ inline float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// Where the results of all pairs go. `sums` is the loss itself if there is one block.
struct PairOutputs {
  int64_t pairs;
  Reduction reduction;
  float scale;    // of the reduced loss and of the gradients: 1, or 1 / pairs
  float* losses;  // (pairs), for Reduction::none
  float* grads;   // (2, pairs)
  float* sums;    // one a block, for the others
};

// losses[i], grads[:, i] = loss(i) for all pairs; the sum of a block's losses.
// Passes: one over the pairs; a second launch adds the blocks' sums above kOneBlockPairs.
// Bytes: each input and each output once.
// Parallelism: one thread a pair, grid stride; one block up to kOneBlockPairs where a sum is asked.
// Accuracy: float; the order of the sums is fixed by the number of pairs: deterministic.
template <typename Loss>
__global__ void __launch_bounds__(kPairThreads) pair_loss_kernel(Loss loss, PairOutputs out) {
  __shared__ float warp_sums[kPairWarps];
  float sum = 0.0f;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < out.pairs; i += step) {
    const PairResult result = loss(i);
    out.grads[i] = result.grad_chosen * out.scale;
    out.grads[out.pairs + i] = result.grad_rejected * out.scale;
    if (out.reduction == Reduction::none) {
      out.losses[i] = result.loss;
    } else {
      sum += result.loss;
    }
  }
  if (out.reduction == Reduction::none) return;
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0) out.sums[blockIdx.x] = gridDim.x == 1 ? sum * out.scale : sum;
}

// loss = scale * (sums[0] + ... + sums[count - 1]), count at most kMaxPairBlocks.
cudaError_t sum_blocks(const float* sums, int count, float scale, float* loss, cudaStream_t stream);

// Runs `loss` over all pairs and reduces. No pairs: one block writes the loss, 0.
template <typename Loss>
cudaError_t launch_pair_loss(const Loss& loss, int64_t pairs, Reduction reduction, float* losses,
                             float* grads, float* workspace, cudaStream_t stream) {
  if (pairs == 0 && reduction == Reduction::none) return cudaSuccess;
  const bool mean = reduction == Reduction::mean && pairs > 0;
  const float scale = mean ? static_cast<float>(1.0 / static_cast<double>(pairs)) : 1.0f;
  const int blocks = static_cast<int>(pair_loss_blocks(pairs, reduction));
  float* sums = blocks == 1 ? losses : workspace;
  const PairOutputs out = {pairs, reduction, scale, losses, grads, sums};
  pair_loss_kernel<<<blocks, pair_loss_threads(pairs), 0, stream>>>(loss, out);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || blocks == 1 || reduction == Reduction::none) return error;
  return sum_blocks(sums, blocks, scale, losses, stream);
}

}  // namespace apt::cuda
