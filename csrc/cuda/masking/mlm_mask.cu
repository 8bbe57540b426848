// BERT's 80/10/10 masking (Devlin 2018) from counter-based random numbers (Salmon 2011), bit for
// bit what csrc/cpu/mlm_mask.cpp computes.
#include <cuda_runtime.h>

#include "apt/mlm_mask.h"
#include "common/common.cuh"

namespace apt::cuda {
namespace {

constexpr int kMaskThreads = 256;
constexpr int kMaskWarps = kMaskThreads / kWarpSize;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kIgnored = -100, kAlways = int64_t{1} << 32;
constexpr unsigned long long kNoKey = ~0ull;
constexpr int kKeyShift = 31;  // positions are below 2^31
constexpr int kNoStart = -1;

struct PhiloxWords {
  uint32_t w0, w1, w2;
};

// Philox4x32-10 of the counter (slot, step, sample low, sample high).
__device__ inline PhiloxWords philox(const MlmMask& a, uint32_t slot, uint64_t sample) {
  uint32_t c0 = slot, c1 = a.step;
  uint32_t c2 = static_cast<uint32_t>(sample), c3 = static_cast<uint32_t>(sample >> 32);
  uint32_t k0 = a.seed_low, k1 = a.seed_high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2};
}

__device__ inline bool is_set(const IntegerMask& mask, int64_t at) {
  if (mask.bytes == 1) return static_cast<const int8_t*>(mask.data)[at] != 0;
  if (mask.bytes == 4) return static_cast<const int32_t*>(mask.data)[at] != 0;
  return static_cast<const int64_t*>(mask.data)[at] != 0;
}

__device__ inline bool is_special(const SpecialRuns& runs, int64_t id) {
  bool special = false;
  for (int r = 0; r < runs.count; ++r) {
    special |= id >= runs.first[r] && id - runs.first[r] < runs.size[r];
  }
  return special;
}

// Number (w * n) >> 32 of the n ids that are not special.
__device__ inline int64_t random_word(const MlmMask& a, uint32_t w) {
  int64_t id = __umulhi(w, a.word_count);
  for (int r = 0; r < a.special_runs.count; ++r) {
    if (id >= a.special_runs.first[r]) id += a.special_runs.size[r];
  }
  return id;
}

// The largest x of this and all earlier threads of the block; `total` is that of all threads.
__device__ inline int block_scan_max(int x, int* shared, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step && before > x) x = before;
  }
  if (lane == kWarpSize - 1) shared[warp] = x;
  __syncthreads();  // every warp's largest is written before any is read
  *total = shared[0];
  for (int w = 0; w < kMaskWarps; ++w) {
    if (w < warp && shared[w] > x) x = shared[w];
    if (shared[w] > *total) *total = shared[w];
  }
  __syncthreads();  // every warp has read before the next tile writes
  return x;
}

__device__ inline unsigned long long block_min(unsigned long long x, unsigned long long* shared) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kFullWarp, x, step);
    if (other < x) x = other;
  }
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();  // every warp's smallest is written before any is read
  for (int w = 0; w < kMaskWarps; ++w) x = shared[w] < x ? shared[w] : x;
  return x;
}

// Of one pass over a row: which eligible slots are chosen.
struct Choice {
  int64_t below;   // those whose draw is below
  int only_start;  // of the word that begins here, unless kNoStart
};

// Writes slot t, whose word begins at `start`; returns whether it was chosen. `smallest` takes the
// key of an eligible slot.
template <typename T>
__device__ bool mask_slot(const MlmMask& a, int64_t row, int t, int start, const Choice& choice,
                          unsigned long long* smallest) {
  const int64_t at = row * a.length + t;
  const uint64_t sample = static_cast<uint64_t>(a.sample_ids ? a.sample_ids[row] : row);
  const PhiloxWords own = philox(a, static_cast<uint32_t>(t), sample);
  const uint32_t draw = start == t ? own.w0 : philox(a, static_cast<uint32_t>(start), sample).w0;
  const T id = static_cast<const T*>(a.input_ids)[at];
  bool eligible = !is_special(a.special_runs, id);
  if (a.attention_mask.data) eligible &= is_set(a.attention_mask, at);
  if (a.special_tokens_mask.data) eligible &= !is_set(a.special_tokens_mask, at);
  if (a.word_ids) eligible &= a.word_ids[at] >= 0;
  bool chosen = eligible && draw < choice.below;
  if (choice.only_start != kNoStart) chosen &= start == choice.only_start;
  const unsigned long long key = static_cast<unsigned long long>(draw) << kKeyShift | start;
  if (eligible && key < *smallest) *smallest = key;
  T masked = id;
  if (chosen && own.w1 < a.mask_below) {
    masked = static_cast<T>(a.mask_token_id);
  } else if (chosen && own.w1 < a.random_below) {
    masked = static_cast<T>(random_word(a, own.w2));
  }
  static_cast<T*>(a.masked_ids)[at] = masked;
  static_cast<T*>(a.labels)[at] = chosen ? id : static_cast<T>(kIgnored);
  a.mask_positions[at] = chosen;
  return chosen;
}

// Writes the block's tiles of a row; the whole row, in order, where there are words.
template <typename T>
__device__ bool mask_tiles(const MlmMask& a, int64_t row, const Choice& choice,
                           unsigned long long* smallest, int* shared) {
  bool any = false;
  int word_start = kNoStart;  // of the word that the tile before ends in
  for (int64_t first = int64_t{blockIdx.y} * kMaskThreads; first < a.length;
       first += int64_t{gridDim.y} * kMaskThreads) {
    const int64_t slot = first + threadIdx.x;
    const bool live = slot < a.length;
    int start = static_cast<int>(live ? slot : a.length - 1);
    if (a.word_ids) {
      const int64_t* word = a.word_ids + row * a.length + start;
      const bool begins = live && (start == 0 || word[0] != word[-1]);
      int total;
      start = block_scan_max(begins ? start : kNoStart, shared, &total);
      start = start > word_start ? start : word_start;
      word_start = total > word_start ? total : word_start;
    }
    if (live) any |= mask_slot<T>(a, row, static_cast<int>(slot), start, choice, smallest);
  }
  return any;
}

// Passes: one; one more over a row that at_least_one finds without a chosen slot. Bytes of int64
// ids: 8 read and 17 written a slot, and the masks. Philox: 10 rounds a slot, 10 more where its
// word began earlier. Parallelism: a thread a slot, a block a tile of a row; with words or
// at_least_one, a block a row.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads) mlm_mask_fwd_kernel(const MlmMask a) {
  __shared__ int scan[kMaskWarps];
  __shared__ unsigned long long minima[kMaskWarps];
  const int64_t row = blockIdx.x;
  unsigned long long smallest = kNoKey;
  const Choice choice = {a.chosen_below, kNoStart};
  const bool any = mask_tiles<T>(a, row, choice, &smallest, scan);
  if (!a.at_least_one || __syncthreads_or(any)) return;
  smallest = block_min(smallest, minima);
  if (smallest == kNoKey) return;
  const Choice rescue = {kAlways, static_cast<int>(smallest & ((1ull << kKeyShift) - 1))};
  mask_tiles<T>(a, row, rescue, &smallest, scan);  // every thread writes its own slots again
}

}  // namespace

cudaError_t mlm_mask_fwd(const MlmMask& a, cudaStream_t stream) {
  if (a.rows == 0 || a.length == 0) return cudaSuccess;
  const int64_t limit = int64_t{1} << 31;
  if (a.rows >= limit || a.length >= limit) return cudaErrorInvalidValue;
  if (a.special_runs.count > kMaxSpecialRuns) return cudaErrorInvalidValue;
  const int64_t tiles = (a.length + kMaskThreads - 1) / kMaskThreads;
  const bool in_order = a.word_ids || a.at_least_one;
  const dim3 grid(static_cast<unsigned>(a.rows),
                  static_cast<unsigned>(in_order            ? 1
                                        : tiles < kMaxGridY ? tiles
                                                            : kMaxGridY));
  if (a.id_bytes == 4) {
    mlm_mask_fwd_kernel<int32_t><<<grid, kMaskThreads, 0, stream>>>(a);
  } else {
    mlm_mask_fwd_kernel<int64_t><<<grid, kMaskThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace apt::cuda
