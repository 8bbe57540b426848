// Philox4x32-10, counter-based random numbers (Salmon 2011), for neighbouring slots of a row.
// A 32-bit word lies in each 64-bit lane: vector units multiply the low halves of such lanes to 64
// bits, so the low word of a product needs no instruction and the high word one shift. The upper
// halves hold rubbish in between, which a multiplication does not read.
#pragma once
#include "common/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace apt::APT_ISA {

constexpr int kLanes64 = kLanes / 2;
using VecI64 = int64_t __attribute__((vector_size(kLanes64 * 8)));
using VecU64 = uint64_t __attribute__((vector_size(kLanes64 * 8)));

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The 64-bit products of the low halves of the lanes.
inline VecU64 multiply_low(VecU64 x, VecU64 y) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(
      _mm512_maskz_mul_epu32(__mmask8(-1), bit_cast<__m512i>(x), bit_cast<__m512i>(y)));
#elif defined(__AVX2__)
  return bit_cast<VecU64>(_mm256_mul_epu32(bit_cast<__m256i>(x), bit_cast<__m256i>(y)));
#elif defined(__SSE2__)
  return bit_cast<VecU64>(_mm_mul_epu32(bit_cast<__m128i>(x), bit_cast<__m128i>(y)));
#elif defined(__aarch64__)
  return bit_cast<VecU64>(
      vmull_u32(vmovn_u64(bit_cast<uint64x2_t>(x)), vmovn_u64(bit_cast<uint64x2_t>(y))));
#else
  return (x & 0xffffffffu) * (y & 0xffffffffu);
#endif
}
inline VecU64 xor3(VecU64 x, VecU64 y, VecU64 z) {
#if defined(__AVX512F__)  // one instruction, which GCC does not find by itself
  constexpr int kXor3 = 0x96;
  return bit_cast<VecU64>(_mm512_ternarylogic_epi64(bit_cast<__m512i>(x), bit_cast<__m512i>(y),
                                                    bit_cast<__m512i>(z), kXor3));
#else
  return x ^ y ^ z;
#endif
}
inline VecU64 splat64(uint64_t x) { return x + VecU64{}; }

// The words of the slots of one row: counters (slot, step, sample low, sample high) under one key.
struct PhiloxRow {
  uint32_t step;
  uint64_t sample, key;
};
struct PhiloxWords {
  VecI64 w0, w1, w2;  // each in [0, 2^32)
};

// The slots are the low halves of the lanes. Half of the first two rounds is the same for all
// slots of a row, which the compiler takes out of their loop.
inline PhiloxWords philox(const PhiloxRow& row, VecU64 slots) {
  const VecU64 multiplier0 = splat64(kPhiloxMultiplier0), multiplier1 = splat64(kPhiloxMultiplier1);
  VecU64 c0 = slots, c1 = splat64(row.step), c2 = splat64(row.sample), c3 = c2 >> 32;
  uint32_t k0 = uint32_t(row.key), k1 = uint32_t(row.key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const VecU64 product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
    c0 = xor3(product1 >> 32, c1, splat64(k0));
    c1 = product1;
    c2 = xor3(product0 >> 32, c3, splat64(k1));
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const VecU64 low = splat64(0xffffffffu);
  return {VecI64(c0 & low), VecI64(c1 & low), VecI64(c2 & low)};
}

}  // namespace apt::APT_ISA
