// CUDA C++ for g++: qualifiers, vector types, built-in variables and intrinsics (see emulator.h).
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __constant__ static
#define __launch_bounds__(...)
// __shared__ and <<<...>>> are rewritten by translate.py before g++ sees the source.

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#include "../emulator.h"

extern uint3 threadIdx;  // set before a thread runs on
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

// Barriers and exchanges between threads. The line is part of the check: all threads that meet must
// have come to the same one.
#define __syncthreads() cuda_emulation::barrier(__LINE__, 0)
#define __syncthreads_count(predicate) cuda_emulation::barrier(__LINE__, (predicate) != 0)
#define __syncthreads_or(predicate) (cuda_emulation::barrier(__LINE__, (predicate) != 0) != 0)

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int base = cuda_emulation::lane() & ~(width - 1);
  return cuda_emulation::shuffle(mask, value, base | (source & (width - 1)), line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_emulation::lane(), source = lane ^ flip;
  const bool outside = (source & ~(width - 1)) > (lane & ~(width - 1));
  return cuda_emulation::shuffle(mask, value, outside ? lane : source, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   int line = __builtin_LINE()) {
  const int lane = cuda_emulation::lane();
  const bool outside = (lane & (width - 1)) + static_cast<int>(delta) >= width;
  return cuda_emulation::shuffle(mask, value, outside ? lane : lane + static_cast<int>(delta),
                                 line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  const int lane = cuda_emulation::lane();
  const bool outside = (lane & (width - 1)) < static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, outside ? lane : lane - static_cast<int>(delta),
                                 line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_emulation::exchange(mask, 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_emulation::ballot(mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_emulation::ballot(mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_emulation::ballot(mask, predicate == 0, line) == 0;
}

// Loads and stores with a cache hint are counted, where counting is on.
template <typename T>
T __ldg(const T* pointer, int line = __builtin_LINE()) {
  cuda_emulation::count_access(pointer, sizeof(T), line, false);
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer, int line = __builtin_LINE()) {
  cuda_emulation::count_access(pointer, sizeof(T), line, false);
  return *pointer;
}
template <typename T>
void __stcs(T* pointer, T value, int line = __builtin_LINE()) {
  cuda_emulation::count_access(pointer, sizeof(T), line, true);
  *pointer = value;
}

template <typename To, typename From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return emulated_bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulated_bit_cast<int>(x); }
inline float __int_as_float(int x) { return emulated_bit_cast<float>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
