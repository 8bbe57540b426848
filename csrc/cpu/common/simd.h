// Vectors of floats for one instruction set, written with GCC/Clang vector extensions.
// Every file under csrc/cpu is compiled once per instruction set (APT_ISA names it), and its
// functions live in the namespace of that set; isa.h chooses one when the library is loaded.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/types.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace apt::APT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using VecF = float __attribute__((vector_size(kLanes * 4)));
using VecD = double __attribute__((vector_size(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4)));
using VecU = uint32_t __attribute__((vector_size(kLanes * 4)));
using VecU16 = uint16_t __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = std::numeric_limits<float>::infinity();

inline VecF splat(float x) { return x - VecF{}; }
inline VecF select(VecI condition, VecF a, VecF b) { return condition ? a : b; }

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// The larger or smaller; b where either is NaN, as the x86 instructions do.
#if defined(__AVX512F__)
inline VecF vmax(VecF a, VecF b) {
  return bit_cast<VecF>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
inline VecF vmin(VecF a, VecF b) {
  return bit_cast<VecF>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
#elif defined(__AVX2__)
inline VecF vmax(VecF a, VecF b) {
  return bit_cast<VecF>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
inline VecF vmin(VecF a, VecF b) {
  return bit_cast<VecF>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
#else
inline VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
inline VecF vmin(VecF a, VecF b) { return a < b ? a : b; }
#endif

inline float sum(VecF v) {
  float total = 0;
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  total = v[0];
  return total;
}

inline float max(VecF v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Scalars <-> float. Rounding to nearest even; NaN stays NaN.
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  // The exponent is rebased by a multiplication, which also normalises subnormals.
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu, sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const float rebased = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(rebased) | special | sign);
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float x, Half* out) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half =
        bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);  // subnormal: 2^-24 units
  } else {
    const uint32_t m = bits & 0x7fffffffu;
    half = (m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(half | sign);
}

// Vectors <-> memory.
inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VecF load(const BFloat16* p) {
  VecU16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return bit_cast<VecF>(__builtin_convertvector(raw, VecU) << 16);
}
inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return bit_cast<VecF>(vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p))));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
// The bits of a bfloat16 in the upper half; the lower half is left over.
inline VecU rounded_to_bf16(VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  return v != v ? VecU{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline void store(BFloat16* p, VecF v) {
  const VecU16 packed = __builtin_convertvector(rounded_to_bf16(v) >> 16, VecU16);
  std::memcpy(p, &packed, sizeof packed);
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<__fp16*>(p), vcvt_f16_f32(bit_cast<float32x4_t>(v)));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}
// Two vectors at once, in whatever order is cheapest: bfloat16 gives the even and the odd elements.
// Sums and maxima do not mind, and store_pair puts everything back where load_pair took it.
struct VecPair {
  VecF first, second;
};
template <class T>
inline VecPair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
inline VecPair load_pair(const BFloat16* p) {
  VecU both;
  std::memcpy(&both, p, sizeof both);
  return {bit_cast<VecF>(both << 16), bit_cast<VecF>(both & 0xffff0000u)};
}
template <class T>
inline void store_pair(T* p, VecPair v) {
  store(p, v.first);
  store(p + kLanes, v.second);
}
inline void store_pair(BFloat16* p, VecPair v) {
  const VecU both = (rounded_to_bf16(v.first) >> 16) | (rounded_to_bf16(v.second) & 0xffff0000u);
  std::memcpy(p, &both, sizeof both);
}

// The first `count` lanes from memory, the others `fill`.
template <class T>
inline VecF load_partial(const T* p, int64_t count, float fill) {
  VecF v = splat(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
inline void store_partial(T* p, int64_t count, VecF v) {
  for (int64_t i = 0; i < count; ++i) from_float(v[i], p + i);
}

// e^x for x <= 88 within 2 ulp, infinity at 89; 0 for results under 2^-126, NaN for NaN. x = n ln2
// + r with ln2 in two parts, |r| <= ln2 / 2, and n falls out of the bits of a float near 1.5 *
// 2^23. The polynomial is e^r, minimax to 2e-09, and exactly 1 at 0: a vocabulary of one has
// log-probability 0.
inline VecF exp(VecF x) {
  constexpr float kLog2e = 1.44269504f, kMagic = 12582912.f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = vmax(splat(-105.f), x);  // -inf would leave r undefined
  const VecF shifted = x * kLog2e + kMagic;
  const VecF n = shifted - kMagic;
  const VecF r = (x - n * kLn2High) - n * kLn2Low;
  VecF poly = splat(0.00138436444f);
  poly = poly * r + 0.00837416295f;
  poly = poly * r + 0.0416680016f;
  poly = poly * r + 0.166664317f;
  poly = poly * r + 0.49999994f;
  poly = poly * r + 1.f;
  poly = poly * r + 1.f;
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_scalef_ps(bit_cast<__m512>(poly), bit_cast<__m512>(n)));
#else
  const VecF scale = bit_cast<VecF>((bit_cast<VecI>(shifted) << 23) + 0x3f800000);
  return select(x < -87.33f, VecF{}, poly * scale);
#endif
}

// 2^y, relative error within 1e-7 and exactly 1 at 0; results under 2^-126 may be 0. NaN for NaN.
// Cheaper than exp: nothing is lost in the reduction, so the rounding of y is the caller's.
// y = n + r with n = floor(y), and the polynomial is 2^r, minimax to 2e-09 on [0, 1].
constexpr double kLog2e = 1.4426950408889634;
inline VecF exp2(VecF y) {
#if defined(__AVX512F__)
  constexpr int kDown = 9;  // to the floor, without an exception
  const VecF r = bit_cast<VecF>(_mm512_reduce_ps(bit_cast<__m512>(y), kDown));
#else
  constexpr float kMagic = 12582912.f;
  y = vmin(splat(128.f), vmax(splat(-150.f), y));  // an infinity would leave r undefined
  const VecF shifted = (y - 0.5f) + kMagic, n = shifted - kMagic, r = y - n;
#endif
  VecF poly = splat(2.1612915e-4f);
  poly = poly * r + 1.24678464e-3f;
  poly = poly * r + 9.67545157e-3f;
  poly = poly * r + 5.54852806e-2f;
  poly = poly * r + 2.40229306e-1f;
  poly = poly * r + 6.93147044e-1f;
  poly = poly * r + 1.f;
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_scalef_ps(bit_cast<__m512>(poly), bit_cast<__m512>(y)));
#else
  const VecF scale = bit_cast<VecF>((bit_cast<VecI>(shifted) << 23) + 0x3f800000);
  return select(y < -126.f, VecF{}, poly * scale);
#endif
}

// tanh within 2 ulp: an odd polynomial near 0 (Cephes tanhf), 1 - 2/(e^2x + 1) elsewhere.
inline VecF tanh(VecF x) {
  const VecF a = vmax(x, -x), s = x * x;
  VecF poly = splat(-5.70498872745e-3f);
  poly = poly * s + 2.06390887954e-2f;
  poly = poly * s - 5.37397155531e-2f;
  poly = poly * s + 1.33314422036e-1f;
  poly = poly * s - 3.33332819422e-1f;
  const VecF small = poly * s * x + x;
  const VecF large = 1.f - 2.f / (exp(2.f * vmin(a, splat(40.f))) + 1.f);
  const VecF signed_large = x < 0.f ? -large : large;
  return select(x != x, x, select(a < 0.625f, small, signed_large));
}

// log(1 + x) within 2 ulp for x in [-1/2, 1]: 2 atanh(t), t = x / (2 + x). The first term of the
// series left out is under 4e-9.
inline VecF log1p(VecF x) {
  const VecF t = x / (2.f + x), q = t * t;
  VecF poly = splat(1.f / 15);
  poly = poly * q + 1.f / 13;
  poly = poly * q + 1.f / 11;
  poly = poly * q + 1.f / 9;
  poly = poly * q + 1.f / 7;
  poly = poly * q + 1.f / 5;
  poly = poly * q + 1.f / 3;
  return 2.f * (t + t * (q * poly));
}

// log(x) within 2 ulp: x = 2^n m, m in [sqrt(1/2), sqrt(2)). NaN under 0, -inf at 0.
inline VecF log(VecF x) {
  constexpr float kLn2High = 0.693359375f,
                  kLn2Low = -2.12194440e-4f;  // high: 9 bits, n * high exact
  const VecI subnormal = x < 0x1p-126f;
  const VecI bits = bit_cast<VecI>(select(subnormal, x * 0x1p23f, x));
  const VecI n = (bits - 0x3f3504f3) >> 23;
  const VecF m = bit_cast<VecF>(bits - (n << 23));
  const VecF exponent = __builtin_convertvector(n, VecF) - select(subnormal, splat(23.f), VecF{});
  const VecF log_m = log1p(m - 1.f);
  VecF y = exponent * kLn2High + (exponent * kLn2Low + log_m);
  y = select(x == 0.f, splat(-kInf), select(x == kInf, x, y));
  return select(x >= 0.f, y, splat(std::numeric_limits<float>::quiet_NaN()));
}

}  // namespace apt::APT_ISA
