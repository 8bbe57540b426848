// The logistic functions of the pair losses, accurate where the plain formulas cancel, for vectors
// of floats and for one double.
#pragma once
#include <algorithm>

#include "simd.h"

namespace apt::APT_ISA {

inline double exp(double x) { return std::exp(x); }
inline double log1p(double x) { return std::log1p(x); }
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
  const V large = 1.f / (1.f + e), small = e * large, log_sum = log1p(e);
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
  VecF poly = splat(1.f / 3628800);  // 1/10!: the Taylor series of e^x - 1, next term under 1e-9
  for (const float factorial : {362880.f, 40320.f, 5040.f, 720.f, 120.f, 24.f, 6.f, 2.f})
    poly = poly * x + 1.f / factorial;
  const VecF small = -(x + x * (x * poly));
  return {select(near, small, 1.f - e), select(near, log(small), log1p(select(near, VecF{}, -e)))};
}

}  // namespace apt::APT_ISA
