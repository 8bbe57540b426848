// The second step of the reduction of many pairs' losses, and the sizes of both.
#include "preference/pair_loss.cuh"

namespace apt::cuda {
namespace {

// loss = scale * sum of the blocks' sums.
// Passes: one. Bytes: 4 a block of the first step. Parallelism: one block, one thread a sum.
// Accuracy: float; a tree of fixed order.
__global__ void __launch_bounds__(kPairThreads)
    sum_blocks_kernel(const float* __restrict__ sums, int count, float scale, float* loss) {
  __shared__ float warp_sums[kPairWarps];
  const int thread = threadIdx.x;
  const float sum = block_sum(thread < count ? sums[thread] : 0.0f, warp_sums);
  if (thread == 0) *loss = sum * scale;
}

}  // namespace

cudaError_t sum_blocks(const float* sums, int count, float scale, float* loss,
                       cudaStream_t stream) {
  sum_blocks_kernel<<<1, kPairThreads, 0, stream>>>(sums, count, scale, loss);
  return cudaGetLastError();
}

// A function of the number of pairs alone, so that the order of every sum is too.
int64_t pair_loss_blocks(int64_t pairs, Reduction reduction) {
  if (reduction != Reduction::none && pairs <= kOneBlockPairs) return 1;
  const int64_t blocks = (pairs + kPairThreads - 1) / kPairThreads;
  return blocks < kMaxPairBlocks ? blocks : kMaxPairBlocks;
}

int64_t pair_loss_workspace(int64_t pairs, Reduction reduction) {
  const int64_t blocks = pair_loss_blocks(pairs, reduction);
  return reduction == Reduction::none || blocks == 1 ? 0 : blocks;
}

}  // namespace apt::cuda
