// The logistic functions of the pair losses, accurate where the plain formulas cancel, for vectors
// of floats and for one double.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace apt::APT_ISA {

// log(1 + x) for x in [0, 1], a polynomial without a division; its relative error is under 2e-8.
inline VecF log1p_of_fraction(VecF x) {
  const VecF x2 = x * x, x4 = x2 * x2;  // Estrin: the pairs do not wait for each other
  const VecF low = (0.333326906f * x - 0.499999881f) + x2 * (0.198979318f * x - 0.249885798f);
  const VecF high = (0.124671258f * x - 0.161293373f) + x2 * (0.0419814028f * x - 0.0830741152f);
  const VecF top = 0.00207295129f * x - 0.0136314994f;
  return x + x2 * (low + x4 * (high + x4 * top));
}

inline double log1p_of_fraction(double x) { return std::log1p(x); }
inline double exp(double x) { return std::exp(x); }
inline double vmin(double a, double b) { return a < b ? a : b; }
inline double select(bool condition, double a, double b) { return condition ? a : b; }
inline double zeros_like(double) { return 0; }
inline VecF zeros_like(VecF) { return VecF{}; }

// S(x), S(-x) and their logarithms; what is not used is not computed.
template <class V>
struct Logistic {
  V right, wrong, log_right, log_wrong;
};
template <class V>
inline Logistic<V> logistic(V x) {
  const V zero = zeros_like(x), e = exp(vmin(x, -x));  // a NaN stays NaN
  const V large = 1.f / (1.f + e), small = e * large, log_sum = log1p_of_fraction(e);
  return {select(x >= zero, large, small), select(x >= zero, small, large), vmin(zero, x) - log_sum,
          vmin(zero, -x) - log_sum};
}

// 1 - e^x and its logarithm for x < 0 (Maechler 2012), each branch exact on its side of -log 2.
template <class V>
struct OneMinusExp {
  V value, log;
};
inline OneMinusExp<double> one_minus_exp(double x) {
  const double value = -std::expm1(x);
  return {value, x > -0.6931471805599453 ? std::log(value) : std::log1p(-std::exp(x))};
}
inline OneMinusExp<VecF> one_minus_exp(VecF x) {
  const VecI near = x > -0.6931472f;
  const VecF e = exp(x);
  // The Taylor series of e^x - 1: 1/9! ... 1/2!; the term after 1/10! is under 1e-9.
  constexpr float kCoefficients[] = {1.f / 362880, 1.f / 40320, 1.f / 5040, 1.f / 720,
                                     1.f / 120,    1.f / 24,    1.f / 6,    1.f / 2};
  VecF poly = splat(1.f / 3628800);
#pragma GCC unroll 8
  for (const float coefficient : kCoefficients) poly = poly * x + coefficient;
  const VecF small = -(x + x * (x * poly));
  return {select(near, small, 1.f - e), select(near, log(small), log1p(select(near, VecF{}, -e)))};
}

}  // namespace apt::APT_ISA
