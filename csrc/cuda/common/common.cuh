// What the CUDA kernels share: element types, 16-byte vectors and reductions of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "apt/dtype.h"

namespace apt::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;  // the widest load of one thread: 512 bytes a warp request

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// How many elements one 16-byte load or store moves.
template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

// The elements of one vector as floats, and back. Vectors stay packed words until they are used:
// 16-bit elements would take a register each.
template <typename T>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int kPerWord = 1;
  __device__ static void unpack(unsigned word, float* x) { x[0] = __uint_as_float(word); }
  __device__ static unsigned pack(const float* x) { return __float_as_uint(x[0]); }
};

template <>
struct Packed<__nv_bfloat16> {
  static constexpr int kPerWord = 2;
  __device__ static void unpack(unsigned word, float* x) {
    x[0] = __uint_as_float(word << 16);  // a bfloat16 is the upper half of a float
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static unsigned pack(const float* x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return reinterpret_cast<const unsigned&>(pair);
  }
};

template <>
struct Packed<__half> {
  static constexpr int kPerWord = 2;
  __device__ static void unpack(unsigned word, float* x) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    x[0] = pair.x;
    x[1] = pair.y;
  }
  __device__ static unsigned pack(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    return reinterpret_cast<const unsigned&>(pair);
  }
};

template <typename T>
__device__ inline void unpack(const uint4& vector, float (&x)[kVectorSize<T>]) {
  constexpr int kPerWord = Packed<T>::kPerWord;
  Packed<T>::unpack(vector.x, x);
  Packed<T>::unpack(vector.y, x + kPerWord);
  Packed<T>::unpack(vector.z, x + 2 * kPerWord);
  Packed<T>::unpack(vector.w, x + 3 * kPerWord);
}

template <typename T>
__device__ inline uint4 pack(const float (&x)[kVectorSize<T>]) {
  constexpr int kPerWord = Packed<T>::kPerWord;
  return make_uint4(Packed<T>::pack(x), Packed<T>::pack(x + kPerWord),
                    Packed<T>::pack(x + 2 * kPerWord), Packed<T>::pack(x + 3 * kPerWord));
}

// 2^x in one instruction, relative error 2^-22; subnormal results become 0.
__device__ inline float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

// The block-wide reductions return the result to every thread with one barrier: every warp combines
// the warps' partial results itself, in the same order. `shared` has one element a warp and is not
// reused, so no barrier is needed after the reads. blockDim.x is a multiple of the warp size.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();  // every warp's partial result is written before any is read
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarpSize ? shared[lane] : 0.0f);
}

__device__ inline float block_max(float x, float* shared) {
  x = warp_max(x);
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();  // every warp's partial result is written before any is read
  return warp_max(shared[lane < static_cast<int>(blockDim.x) / kWarpSize ? lane : 0]);
}

// Calls function(T()) with the element type that `dtype` names.
template <typename Function>
cudaError_t dispatch_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float());
    case DType::kBFloat16:
      return function(__nv_bfloat16());
    case DType::kFloat16:
      return function(__half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace apt::cuda
