// How a block walks one row of any alignment and any length in 16-byte loads.
#pragma once

#include <cstdint>

#include "common/common.cuh"

namespace apt::cuda {

// A row as a block walks it: `head` scalars, `vectors` whole vectors, and the scalars left.
struct RowCut {
  int head;
  int vectors;
};

// How many elements past a 16-byte boundary `pointer` lies.
template <typename T>
__device__ inline int elements_past_boundary(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

// Cuts a row so that its vectors begin at a 16-byte boundary.
template <typename T>
__device__ inline RowCut cut_row(const T* row, int length) {
  constexpr int kSize = kVectorSize<T>;
  const int head = min((kSize - elements_past_boundary(row)) % kSize, length);
  return {head, (length - head) / kSize};
}

// Cuts a row so that the vectors of `target` begin at a 16-byte boundary and the two aligned
// vectors of `source` that hold each of them lie inside the row.
template <typename T>
__device__ inline RowCut cut_row_pair(const T* target, const T* source, int length, int* shift) {
  constexpr int kSize = kVectorSize<T>;
  RowCut cut = cut_row(target, length);
  *shift = elements_past_boundary(source + cut.head);
  if (*shift == 0) return cut;
  if (*shift > cut.head) {  // the first aligned vector of the source begins before the row
    cut.head += kSize;
    cut.vectors -= 1;
  }
  const int end = cut.head - *shift + (cut.vectors + 1) * kSize;
  if (end > length) cut.vectors -= 1;  // the last one ends after the row
  if (cut.vectors <= 0) return {length, 0};
  return cut;
}

// Calls use(i) for every element of the row that no vector holds.
template <typename T, typename Use>
__device__ inline void for_each_edge(const RowCut& cut, int length, Use use) {
  const int inside = cut.vectors * kVectorSize<T>;
  for (int i = threadIdx.x; i < length - inside; i += blockDim.x) {
    use(i < cut.head ? i : i + inside);
  }
}

// Calls use(i, load(i)) for every i below count, kUnroll loads in flight in each thread.
template <int kUnroll, typename Load, typename Use>
__device__ inline void for_each_vector(int count, Load load, Use use) {
  const int threads = blockDim.x;
  for (int first = threadIdx.x; first < count; first += kUnroll * threads) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * threads < count) loaded[u] = load(first + u * threads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * threads < count) use(first + u * threads, loaded[u]);
    }
  }
}

// Loads and stores of 16 aligned bytes that are not needed again soon.
template <typename T>
__device__ inline uint4 load_streaming(const T* pointer) {
  return __ldcs(reinterpret_cast<const uint4*>(pointer));
}

template <typename T>
__device__ inline void store_streaming(T* pointer, const uint4& vector) {
  __stcs(reinterpret_cast<uint4*>(pointer), vector);
}

// Loads the 16 bytes that begin `shift` elements (not 0) after the boundary `aligned`, as two
// aligned vectors: the neighbouring thread reads the second one too and finds it in the cache.
template <typename T>
__device__ inline uint4 load_shifted(const T* aligned, int shift) {
  const uint4* source = reinterpret_cast<const uint4*>(aligned);
  const uint4 low = __ldg(source), high = __ldg(source + 1);
  unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int bytes = shift * static_cast<int>(sizeof(T));
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (bytes & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  const unsigned bits = bytes % 4 * 8;
  return make_uint4(
      __funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
      __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits));
}

// How many threads a block needs to walk a row of `length` elements with kUnroll loads in flight.
template <typename T, int kUnroll>
int row_threads(int64_t length, int max_threads) {
  const int64_t per_warp = int64_t{kWarpSize} * kUnroll * kVectorSize<T>;
  const int64_t threads = (length + per_warp - 1) / per_warp * kWarpSize;
  return static_cast<int>(threads < max_threads ? threads : max_threads);
}

}  // namespace apt::cuda
