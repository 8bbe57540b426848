// Generalised advantage estimation (Schulman 2016): A_t = delta_t + gamma lambda A_(t+1), from the
// last step back, t + 1 being the next step that counts.
#include "apt/gae.h"
#include "common/common.cuh"

namespace apt::cuda {
namespace {

constexpr int kRowThreads = 128;
constexpr int kMostScanWarps = 8;
constexpr int64_t kShort = 32;  // a warp would be idle in part
constexpr int64_t kGridLimit = int64_t{1} << 31;
constexpr int kWhitenThreads = kGaeWhitenBlocks;       // a thread adds one block's sum
constexpr int64_t kStepsOfBlock = 8 * kWhitenThreads;  // at least, of a block that whitens
constexpr double kWhitenEpsilon = 1e-8;

// The steps of a row or of a packed sequence.
struct Sequence {
  int64_t row, first, steps;
  float after_last;  // the value after the last step that counts, of the bootstraps of rows
};

__device__ inline Sequence sequence_of(const Gae& a, int64_t row) {
  Sequence s = {row, 0, a.length, 0.0f};
  if (a.cu_seqlens) {
    const int64_t begin = a.cu_seqlens[row], end = a.cu_seqlens[row + 1];
    s.row = 0;
    s.first = begin < 0 ? 0 : begin;
    s.steps = (end < a.length ? end : a.length) - s.first;
  }
  if (a.bootstrap.data && !a.bootstrap_per_step) {
    s.after_last = static_cast<const float*>(a.bootstrap.data)[row * a.bootstrap.row_stride];
  }
  return s;
}

template <typename T>
__device__ inline T element(const GaeInput& x, int64_t row, int64_t t) {
  return static_cast<const T*>(x.data)[row * x.row_stride + t * x.step_stride];
}
__device__ inline bool flag(const GaeInput& x, int64_t row, int64_t t, bool absent) {
  return x.data ? element<bool>(x, row, t) : absent;
}

// One step that counts, as the map x -> delta + decay x of the advantage after it.
struct Map {
  float delta, decay;
  // A decay of 0 cuts: what lies behind may be anything.
  __device__ float operator()(float x) const { return decay == 0.0f ? delta : delta + decay * x; }
  __device__ Map after(const Map& later) const {
    return {(*this)(later.delta), decay * later.decay};
  }
};

// next_value is that of the next step that counts, if there is one: else this is the last.
template <typename T>
__device__ inline Map step_map(const Gae& a, const Sequence& s, int64_t t, float value,
                               float next_value, bool last) {
  const bool ends = flag(a.terminated, s.row, t, false);
  const bool breaks = last || flag(a.truncated, s.row, t, false);
  float next = next_value;
  if (ends) {
    next = 0.0f;
  } else if (breaks && a.bootstrap_per_step) {
    next = element<float>(a.bootstrap, s.row, t);
  } else if (breaks) {
    next = last ? s.after_last : 0.0f;
  }
  const float reward = to_float(element<T>(a.rewards, s.row, t));
  return {reward + a.gamma * next - value, ends || breaks ? 0.0f : a.decay};
}

__device__ inline void write(const Gae& a, const Sequence& s, int64_t t, float advantage,
                             float value) {
  const int64_t at = s.row * a.out_row_stride + t * a.out_step_stride;
  a.advantages[at] = advantage;
  a.returns[at] = advantage + value;
}

// Short rows, or rows that lie side by side. Passes: one; every input is read once. Parallelism: a
// thread a row. Accuracy: float32, in the order of the recursion.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) gae_rows_kernel(const Gae a) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (row >= a.rows) return;
  const Sequence s = sequence_of(a, row);
  float advantage = 0.0f, next_value = 0.0f;
  bool last = true;
#pragma unroll 1  // four steps at once take 111 registers on sm_100
  for (int64_t t = s.first + s.steps - 1; t >= s.first; --t) {
    if (!flag(a.mask, s.row, t, true)) {
      write(a, s, t, 0.0f, 0.0f);
      continue;
    }
    const float value = to_float(element<T>(a.values, s.row, t));
    advantage = step_map<T>(a, s, t, value, next_value, last)(advantage);
    write(a, s, t, advantage, value);
    next_value = value;
    last = false;
  }
}

// The first step that counts among some: its value, and whether there is one.
struct First {
  float value;
  bool any;
};

// Long rows. Passes: one; every input is read once. Parallelism: a block a row, a scan of
// blockDim.x steps at a time. Accuracy: float32, in the order of a tree.
template <typename T>
__global__ void __launch_bounds__(kMostScanWarps* kWarpSize) gae_scan_kernel(const Gae a) {
  __shared__ float first_values[kMostScanWarps];
  __shared__ int first_any[kMostScanWarps];
  __shared__ float deltas[kMostScanWarps];
  __shared__ float decays[kMostScanWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const int64_t tile = blockDim.x;
  const Sequence s = sequence_of(a, blockIdx.x);
  float trace = 0.0f;           // the advantage of the step after the tile
  First after = {0.0f, false};  // the first step that counts after the tile
  for (int64_t start = (s.steps - 1) / tile * tile; start >= 0 && s.steps > 0; start -= tile) {
    const int64_t step = start + threadIdx.x, t = s.first + step;
    const bool live = step < s.steps, counts = live && flag(a.mask, s.row, t, true);
    const float value = counts ? to_float(element<T>(a.values, s.row, t)) : 0.0f;
    const unsigned counting = __ballot_sync(kFullWarp, counts);
    const float first_value = __shfl_sync(kFullWarp, value, counting ? __ffs(counting) - 1 : 0);
    if (lane == 0) {
      first_values[warp] = first_value;
      first_any[warp] = counting != 0;
    }
    const unsigned later = counting & (lane == kWarpSize - 1 ? 0u : kFullWarp << (lane + 1));
    const float within = __shfl_sync(kFullWarp, value, later ? __ffs(later) - 1 : lane);
    __syncthreads();  // the first steps of all warps are written before any is read, and the maps
                      // of the tile before are read before any is written
    First next = after, all = after;
    for (int w = warps - 1; w >= 0; --w) {
      if (first_any[w]) all = {first_values[w], true};
      if (w > warp && first_any[w]) next = all;
    }
    if (later) next = {within, true};
    Map map = {0.0f, 1.0f};  // of a step that does not count
    if (counts) map = step_map<T>(a, s, t, value, next.value, !next.any);
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const Map behind = {__shfl_down_sync(kFullWarp, map.delta, distance),
                          __shfl_down_sync(kFullWarp, map.decay, distance)};
      if (lane + distance < kWarpSize) map = map.after(behind);
    }
    if (lane == 0) {
      deltas[warp] = map.delta;
      decays[warp] = map.decay;
    }
    __syncthreads();  // the maps of all warps are written before any is read, and the first steps
                      // are read before the next tile's are written
    float behind = trace;
    for (int w = warps - 1; w >= 0; --w) {
      trace = Map{deltas[w], decays[w]}(trace);
      if (w == warp + 1) behind = trace;
    }
    if (live) write(a, s, t, counts ? map(behind) : 0.0f, value);
    after = all;
  }
}

// The sum over the block, in every thread.
__device__ inline double block_total(double x, double* shared) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  __syncthreads();  // the sum before has been read
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();  // every warp's sum is written before any is read
  double total = 0.0;
  for (int w = 0; w < kWhitenThreads / kWarpSize; ++w) total += shared[w];
  return total;
}

// What whitening knows after each pass, from the sums of all blocks.
struct Moments {
  double count, mean, scale;
};

__device__ inline Moments moments(const double* workspace, bool squares, double* shared) {
  const auto total_of = [&](int quantity) {
    const int block = threadIdx.x;
    const bool wrote = block < static_cast<int>(gridDim.x);
    return block_total(wrote ? workspace[quantity * kGaeWhitenBlocks + block] : 0.0, shared);
  };
  const double count = total_of(0), sum = total_of(1);
  Moments m = {count, sum / (count > 1.0 ? count : 1.0), 0.0};
  if (squares) {
    m.scale = 1.0 / sqrt(total_of(2) / (count > 2.0 ? count - 1.0 : 1.0) + kWhitenEpsilon);
  }
  return m;
}

// Passes over the advantages: kSum (and count), kSquares around the mean, kScale in place. Bytes: 4
// (and the mask) a step, written by the last. Accuracy: sums in float64, in a fixed order.
enum class WhitenPass { kSum, kSquares, kScale };

template <WhitenPass kPass>
__global__ void __launch_bounds__(kWhitenThreads) gae_whiten_kernel(const Gae a, int64_t size) {
  __shared__ double shared[kWhitenThreads / kWarpSize];
  Moments m = {0.0, 0.0, 0.0};
  if (kPass != WhitenPass::kSum) m = moments(a.workspace, kPass == WhitenPass::kScale, shared);
  double sum = 0.0, count = 0.0;
  for (int64_t i = int64_t{blockIdx.x} * kWhitenThreads + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * kWhitenThreads) {
    if (a.flat_mask && !a.flat_mask[i]) continue;
    const double centred = a.advantages[i] - m.mean;
    if (kPass == WhitenPass::kScale) a.advantages[i] = static_cast<float>(centred * m.scale);
    sum += kPass == WhitenPass::kSum ? centred : centred * centred;
    count += 1.0;
  }
  if (kPass == WhitenPass::kScale) return;
  sum = block_total(sum, shared);
  count = block_total(count, shared);
  if (threadIdx.x != 0) return;
  if (kPass == WhitenPass::kSum) a.workspace[blockIdx.x] = count;
  a.workspace[(kPass == WhitenPass::kSum ? 1 : 2) * kGaeWhitenBlocks + blockIdx.x] = sum;
}

template <WhitenPass kPass>
void whiten(const Gae& a, int64_t size, cudaStream_t stream) {
  const int64_t blocks = (size + kStepsOfBlock - 1) / kStepsOfBlock;
  const int grid = static_cast<int>(blocks < kGaeWhitenBlocks ? blocks : kGaeWhitenBlocks);
  gae_whiten_kernel<kPass><<<grid, kWhitenThreads, 0, stream>>>(a, size);
}

}  // namespace

cudaError_t gae_fwd(const Gae& a, cudaStream_t stream) {
  const int64_t size = a.cu_seqlens ? a.length : a.rows * a.length;
  if (a.rows == 0 || size == 0) return cudaSuccess;
  if (a.rows >= kGridLimit) return cudaErrorInvalidValue;
  const int64_t steps = a.cu_seqlens ? a.length / a.rows : a.length;
  const bool side_by_side = !a.cu_seqlens && a.out_step_stride != 1;
  const int64_t warps = (steps + kWarpSize - 1) / kWarpSize;
  const int threads = static_cast<int>(warps < kMostScanWarps ? warps : kMostScanWarps) * kWarpSize;
  const cudaError_t error = dispatch_dtype(a.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    if (side_by_side || steps <= kShort) {
      const unsigned blocks = static_cast<unsigned>((a.rows + kRowThreads - 1) / kRowThreads);
      gae_rows_kernel<T><<<blocks, kRowThreads, 0, stream>>>(a);
    } else {
      gae_scan_kernel<T><<<static_cast<unsigned>(a.rows), threads, 0, stream>>>(a);
    }
    return cudaGetLastError();
  });
  if (error != cudaSuccess || !a.workspace) return error;
  whiten<WhitenPass::kSum>(a, size, stream);
  whiten<WhitenPass::kSquares>(a, size, stream);
  whiten<WhitenPass::kScale>(a, size, stream);
  return cudaGetLastError();
}

}  // namespace apt::cuda
