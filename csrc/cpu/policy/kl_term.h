// The estimators of KL(policy || reference) of one token, and their derivatives (Schulman 2020).
#pragma once
#include "policy/token_loss.h"

namespace apt::APT_ISA {

constexpr float kLogRatioBound = 20;  // e^20 = 4.9e8: beyond it a ratio says nothing

template <class V, class S>
inline V bounded_log_ratio(V x, S bound) {
  const V zero = zeros_like(x);
  return clamp<V>(x, zero - bound, zero + bound);
}

template <class V>
struct KlTerm {
  V value, grad;
};
// k1: d; k2: d^2 / 2; k3: e^x - 1 - x at x = -d within the bound, no gradient outside.
template <class S, class V>
inline KlTerm<V> kl_term(KlEstimator estimator, V difference) {
  const V zero = zeros_like(difference);
  if (estimator == KlEstimator::k1) return {difference, zero + S(1)};
  if (estimator == KlEstimator::k2) return {S(0.5) * difference * difference, difference};
  const V x = bounded_log_ratio<V>(-difference, S(kLogRatioBound));
  const auto minus = exp_minus(x, exp(x));
  return {minus.expm1_minus_x, select(x == -difference, -minus.expm1, zero)};
}

}  // namespace apt::APT_ISA
