// The sums of a softmax in one pass over its columns (Milakov & Gimelshein 2018).
#pragma once

#include <cfloat>

#include "common/common.cuh"

namespace apt::cuda {

// Running sums over columns y: 2^((y - max) * scale), and that times (y - max).
// `max` starts finite, so that a row of -inf gives sum 0 and not NaN.
template <bool kEntropy, int kMaxWarps>
struct OnlineSoftmax {
  float max = -FLT_MAX;
  float sum = 0.0f;
  float weighted = 0.0f;

  __device__ void move_max(float new_max, float scale) {
    const float step = fmaxf(max - new_max, -FLT_MAX);  // -inf would make NaN with sum = 0
    const float factor = exp2_approx(step * scale);
    if (kEntropy) weighted = weighted * factor + sum * (factor * step);
    sum *= factor;
    max = new_max;
  }

  template <int kSize>
  __device__ void add(const float (&y)[kSize], float scale) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kSize; ++i) new_max = fmaxf(new_max, y[i]);
    if (new_max > max) move_max(new_max, scale);
    float chunk = 0.0f, weighted_chunk = 0.0f;  // fewer roundings at the size of the whole sum
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float difference = y[i] - max;
      const float term = exp2_approx(difference * scale);  // NaN stays NaN here
      chunk += term;
      if (kEntropy) weighted_chunk += term * fmaxf(difference, -FLT_MAX);  // -inf: 0, not 0 * inf
    }
    sum += chunk;
    if (kEntropy) weighted += weighted_chunk;
  }

  // Makes the sums those of the whole block, in every thread.
  __device__ void reduce(float scale) {
    __shared__ float maxima[kMaxWarps];
    __shared__ float sums[kMaxWarps];
    __shared__ float weighted_sums[kMaxWarps];
    move_max(block_max(max, maxima), scale);
    sum = block_sum(sum, sums);
    if (kEntropy) weighted = block_sum(weighted, weighted_sums);
  }
};

}  // namespace apt::cuda
