// float16 for the emulation: rounds to nearest, ties to even, subnormals kept, as the GPU does.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = ldexpf(static_cast<float>(fraction), -24);
  } else {
    magnitude = ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return sign != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (magnitude != magnitude) return {0x7fff};
  unsigned bits;
  if (magnitude >= 65520.0f) {  // halfway between the largest float16 and the next power of two
    bits = 0x7c00;
  } else if (magnitude < 6.103515625e-5f) {  // subnormal: multiples of 2^-24
    bits = static_cast<unsigned>(rintf(magnitude * 16777216.0f));
  } else {
    const unsigned wide = __float_as_uint(magnitude);
    const unsigned rounded = wide + 0xfff + (wide >> 13 & 1);
    bits = (rounded >> 13) - (112u << 10);  // exponents are biased by 127 and by 15
  }
  return {static_cast<uint16_t>(sign | bits)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
