// Log-probabilities of tokens and entropies from logits, and their gradient.
#include "apt/token_logprobs.h"
#include "common/common.cuh"
#include "common/online_softmax.cuh"
#include "common/row_vectors.cuh"

namespace apt::cuda {
namespace {

// The threads of a block depend on V alone, so a row's result does not depend on the other rows.
constexpr int kMaxThreads = 512;  // with 4 loads in flight a block keeps 32 KiB under way
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMinBlocks = 2;  // on a multiprocessor: at most 64 registers a thread
constexpr int kUnroll = 4;
constexpr int kShiftedUnroll = 2;  // each shifted load is two loads
constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kMaxSize =
    (int64_t{1} << 31) - (int64_t{1} << 20);  // column steps stay in 32 bits

template <typename T>
__device__ const T* row_begin(const LogitsRows& logits) {
  const unsigned B = static_cast<unsigned>(logits.B);
  const int64_t a = blockIdx.x / B, b = blockIdx.x % B;
  return static_cast<const T*>(logits.data) + a * logits.stride_a + b * logits.stride_b;
}

__device__ inline bool is_masked(const LogitsRows& logits) {
  return logits.mask != nullptr && !logits.mask[blockIdx.x];
}

__device__ inline float inverse_temperature(const LogitsRows& logits) {
  return 1.0f / (logits.temperatures ? logits.temperatures[blockIdx.x] : logits.temperature);
}

// cap(x) = softcap * tanh(x / softcap); an excluded column (-inf) stays excluded.
template <bool kSoftcap>
__device__ inline float cap(float x, float softcap) {
  if (!kSoftcap || x == -INFINITY) return x;
  return softcap * tanhf(x / softcap);
}

// logps[k] = z[id_k] - lse, lse in two parts and (if asked) the entropy of one row, online softmax.
// Passes: the row is read once, then one element an id.
// Bytes: V * sizeof(T) + 12 K + 12 a row, in 16-byte loads whatever V and the alignment are.
// Parallelism: one block a row, 32 to 512 threads by V.
// Accuracy: float sums, exponents relative to the maximum; large logits lose no digits of lse.
template <typename T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    token_logprobs_fwd_kernel(LogitsRows logits, const int64_t* __restrict__ token_ids, int K,
                              float* __restrict__ logps, float* __restrict__ entropy,
                              float2* __restrict__ lse) {
  const int64_t row = blockIdx.x;
  token_ids += row * K;
  logps += row * K;
  if (is_masked(logits)) {
    for (int k = threadIdx.x; k < K; k += blockDim.x) logps[k] = 0.0f;
    if (threadIdx.x == 0) lse[row] = make_float2(0.0f, 0.0f);
    if (kEntropy && threadIdx.x == 0) entropy[row] = 0.0f;
    return;
  }
  const T* x = row_begin<T>(logits);
  const int V = static_cast<int>(logits.V);
  const float softcap = logits.softcap;
  const float inverse = inverse_temperature(logits);
  const float scale = inverse * kLog2E;

  OnlineSoftmax<kEntropy, kMaxWarps> softmax;
  const RowCut cut = cut_row(x, V);
  for_each_vector<kUnroll>(
      cut.vectors, [&](int i) { return load_streaming(x + cut.head + i * kVectorSize<T>); },
      [&](int, const uint4& vector) {
        float y[kVectorSize<T>];
        unpack<T>(vector, y);
#pragma unroll
        for (float& value : y) value = cap<kSoftcap>(value, softcap);
        softmax.add(y, scale);
      });
  for_each_edge<T>(cut, V, [&](int i) {
    const float y[1] = {cap<kSoftcap>(to_float(__ldg(x + i)), softcap)};
    softmax.add(y, scale);
  });
  softmax.reduce(scale);

  const float log_sum = logf(softmax.sum);
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    const int64_t id = token_ids[k];
    float logp = NAN;
    if (id >= 0 && id < V) {
      const float y = cap<kSoftcap>(to_float(__ldg(x + id)), softcap);
      logp = (y - softmax.max) * inverse - log_sum;
    }
    logps[k] = logp;
  }
  if (threadIdx.x != 0) return;
  lse[row] = make_float2(softmax.max, log_sum);
  if (kEntropy) entropy[row] = log_sum - softmax.weighted * inverse / softmax.sum;
}

// What the gradient of a row needs besides its columns.
struct RowGradient {
  float softcap;
  float inverse;  // 1 / temperature
  float max;      // of the capped logits
  float log_sum;  // of e^(z - max z): in one float with the maximum it would lose digits of p
  float pull;     // sum of the ids' gradients + grad_entropy * entropy
  float grad_entropy;

  // d loss / d x of a column whose own log-probabilities have the gradient `gathered`.
  template <bool kSoftcap>
  __device__ float operator()(float x, float gathered) const {
    float y = x, slope = inverse;
    if (kSoftcap && x != -INFINITY) {
      const float t = tanhf(x / softcap);
      y = softcap * t;
      slope *= 1.0f - t * t;
    }
    const float logp = fmaf(y - max, inverse, -log_sum);
    const float p = expf(logp);
    // p = 0 adds exactly 0: grad_entropy * 0 * (-inf) would be NaN
    const float back = p == 0.0f ? 0.0f : p * fmaf(grad_entropy, logp, pull);
    return (gathered - back) * slope;
  }
};

template <typename T, bool kSoftcap>
__device__ inline uint4 grad_vector(const RowGradient& gradient, const uint4& vector) {
  float x[kVectorSize<T>];
  unpack<T>(vector, x);
#pragma unroll
  for (float& value : x) value = gradient.template operator()<kSoftcap>(value, 0.0f);
  return pack<T>(x);
}

template <typename T>
__device__ inline void zero_row(T* row, int V) {
  const RowCut cut = cut_row(row, V);
  for (int i = threadIdx.x; i < cut.vectors; i += blockDim.x) {
    store_streaming(row + cut.head + i * kVectorSize<T>, make_uint4(0, 0, 0, 0));
  }
  for_each_edge<T>(cut, V, [&](int i) { __stcs(row + i, from_float<T>(0.0f)); });
}

// Sum of the gradients of the valid ids; every warp forms it alone, so no barrier is needed.
__device__ inline float sum_grad_logps(const float* grad_logps, const int64_t* token_ids, int K,
                                       int V) {
  float sum = 0.0f;
  for (int k = threadIdx.x % kWarpSize; k < K; k += kWarpSize) {
    if (token_ids[k] >= 0 && token_ids[k] < V) sum += grad_logps[k];
  }
  return warp_sum(sum);
}

// Gradient of every column as if it were not gathered.
template <typename T, bool kSoftcap>
__device__ inline void grad_columns(const RowGradient& gradient, const T* x, T* grad, int V) {
  constexpr int kSize = kVectorSize<T>;
  int shift;
  const RowCut cut = cut_row_pair(grad, x, V, &shift);
  const T* source = x + cut.head;
  T* target = grad + cut.head;
  const auto use = [&](int i, const uint4& vector) {
    store_streaming(target + i * kSize, grad_vector<T, kSoftcap>(gradient, vector));
  };
  if (shift == 0) {
    const auto load = [&](int i) { return load_streaming(source + i * kSize); };
    for_each_vector<kUnroll>(cut.vectors, load, use);
  } else {
    const auto load = [&](int i) { return load_shifted(source - shift + i * kSize, shift); };
    for_each_vector<kShiftedUnroll>(cut.vectors, load, use);
  }
  for_each_edge<T>(cut, V, [&](int i) {
    const float value = gradient.template operator()<kSoftcap>(to_float(__ldg(x + i)), 0.0f);
    __stcs(grad + i, from_float<T>(value));
  });
}

// d loss / d logits of one row: slope * (g_k [v = id_k] - p_v (sum g + ge (log p_v + H))).
// Passes: the row is read once and written once, then the K gathered columns again.
// Bytes: 2 V * sizeof(T) + 12 K + 12 a row; 16-byte stores, loads shifted where alignments differ.
// Parallelism: one block a row, 32 to 512 threads by V; each element has one writer at a time.
// Accuracy: float; p from the two parts of the lse; one rounding to T.
template <typename T, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    token_logprobs_bwd_kernel(const float* __restrict__ grad_logps,
                              const float* __restrict__ grad_entropy, LogitsRows logits,
                              const int64_t* __restrict__ token_ids, int K,
                              const float2* __restrict__ lse, const float* __restrict__ entropy,
                              T* __restrict__ grad_logits) {
  const int64_t row = blockIdx.x;
  const int V = static_cast<int>(logits.V);
  grad_logits += row * V;
  if (is_masked(logits)) return zero_row(grad_logits, V);
  grad_logps += row * K;
  token_ids += row * K;
  const T* x = row_begin<T>(logits);
  const float sum = sum_grad_logps(grad_logps, token_ids, K, V);
  const float grad_of_entropy = grad_entropy ? grad_entropy[row] : 0.0f;
  const RowGradient gradient = {logits.softcap,
                                inverse_temperature(logits),
                                lse[row].x,
                                lse[row].y,
                                fmaf(grad_of_entropy, grad_entropy ? entropy[row] : 0.0f, sum),
                                grad_of_entropy};
  grad_columns<T, kSoftcap>(gradient, x, grad_logits, V);

  __syncthreads();  // the columns are written before those of the ids are written again
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    const int64_t id = token_ids[k];
    bool first = id >= 0 && id < V;  // the first of equal ids writes for all of them
#pragma unroll 1                     // K is small: unrolled, this is most of the kernel's code
    for (int other = 0; first && other < k; ++other) first = token_ids[other] != id;
    if (!first) continue;
    float gathered = 0.0f;
#pragma unroll 1
    for (int other = k; other < K; ++other) {
      if (token_ids[other] == id) gathered += grad_logps[other];
    }
    const float grad = gradient.template operator()<kSoftcap>(to_float(__ldg(x + id)), gathered);
    __stcs(grad_logits + id, from_float<T>(grad));
  }
}

bool too_large(const LogitsRows& logits, int64_t K) {
  return logits.V > kMaxSize || K > kMaxSize || (logits.B > 0 && logits.A > kMaxSize / logits.B);
}

}  // namespace

cudaError_t token_logprobs_fwd(const LogitsRows& logits, const int64_t* token_ids, int64_t K,
                               float* logps, float* entropy, double* lse, cudaStream_t stream) {
  if (logits.A == 0 || logits.B == 0) return cudaSuccess;
  if (too_large(logits, K)) return cudaErrorInvalidValue;
  const int k = static_cast<int>(K);
  return dispatch_dtype(logits.dtype, [&](auto element) {
    using T = decltype(element);
    const unsigned rows = static_cast<unsigned>(logits.A * logits.B);
    const int threads = row_threads<T, kUnroll>(logits.V, kMaxThreads);
    const auto kernel = logits.softcap != 0.0f
                            ? (entropy ? token_logprobs_fwd_kernel<T, true, true>
                                       : token_logprobs_fwd_kernel<T, true, false>)
                            : (entropy ? token_logprobs_fwd_kernel<T, false, true>
                                       : token_logprobs_fwd_kernel<T, false, false>);
    kernel<<<rows, threads, 0, stream>>>(logits, token_ids, k, logps, entropy,
                                         reinterpret_cast<float2*>(lse));
    return cudaGetLastError();
  });
}

cudaError_t token_logprobs_bwd(const float* grad_logps, const float* grad_entropy,
                               const LogitsRows& logits, const int64_t* token_ids, int64_t K,
                               const double* lse, const float* entropy, void* grad_logits,
                               cudaStream_t stream) {
  if (logits.A == 0 || logits.B == 0) return cudaSuccess;
  if (too_large(logits, K)) return cudaErrorInvalidValue;
  const int k = static_cast<int>(K);
  return dispatch_dtype(logits.dtype, [&](auto element) {
    using T = decltype(element);
    const unsigned rows = static_cast<unsigned>(logits.A * logits.B);
    const int threads = row_threads<T, kUnroll>(logits.V, kMaxThreads);
    const auto kernel = logits.softcap != 0.0f ? token_logprobs_bwd_kernel<T, true>
                                               : token_logprobs_bwd_kernel<T, false>;
    kernel<<<rows, threads, 0, stream>>>(grad_logps, grad_entropy, logits, token_ids, k,
                                         reinterpret_cast<const float2*>(lse), entropy,
                                         static_cast<T*>(grad_logits));
    return cudaGetLastError();
  });
}

}  // namespace apt::cuda
