// The surrogates of policy optimisation, of one token or a vector of tokens, and their gradients.
#pragma once
#include "policy/kl_term.h"
#include "policy/policy_loss.h"

namespace apt::APT_ISA {

template <class S>
struct Constants {
  S low, high, dual, sapo_temperature_pos, sapo_temperature_neg, kl_coef;
  explicit Constants(const PolicyOptions& o)
      : low(1 - o.clip_low),
        high(1 + o.clip_high),
        dual(o.dual_clip),
        sapo_temperature_pos(o.sapo_temperature_pos),
        sapo_temperature_neg(o.sapo_temperature_neg),
        kl_coef(o.kl_coef) {}
};

// coefficient * x; a coefficient of 0 leaves x out, for 0 * infinity would be NaN.
template <class V, class S>
inline V weighted(S coefficient, V x) {
  return coefficient == 0 ? zeros_like(x) : coefficient * x;
}

template <class V>
struct TokenResult {
  V loss, grad, clipped, dual_clipped;
};

// -A r with r held in a range that depends on the sign of A; no gradient where it is held.
template <class V, class S>
inline TokenResult<V> clip(V ratio, V advantage, V slope, const Constants<S>& k) {
  const V zero = zeros_like(ratio), one = zero + S(1);
  const auto negative = advantage < zero;
  const V low = select(negative, zero + k.low, zero - S(INFINITY));
  const V high = select(negative, zero + k.dual, zero + k.high);
  const V bounded = clamp(ratio, low, high);
  const auto above = (advantage > zero) & (ratio > k.high);
  return {-advantage * bounded, select((ratio < low) | (ratio > high), zero, -advantage * slope),
          select(above | (negative & (ratio < low)), one, zero),
          select(negative & (ratio > high), one, zero)};
}

template <class V, class S>
inline TokenResult<V> cispo(V logps, V ratio, V advantage, const Constants<S>& k) {
  const V zero = zeros_like(ratio), low = zero + k.low, high = zero + k.high;
  const V grad = -advantage * clamp(ratio, low, high);
  return {grad * logps, grad, select((ratio < low) | (ratio > high), zero + S(1), zero), zero};
}

template <class V, class S>
inline TokenResult<V> sapo(V ratio, V advantage, V slope, const Constants<S>& k) {
  const V zero = zeros_like(ratio);
  const V tau =
      select(advantage > zero, zero + k.sapo_temperature_pos, zero + k.sapo_temperature_neg);
  const auto gate = logistic<V>(tau * (ratio - S(1)));
  return {-advantage * (S(4) / tau) * gate.right,
          -advantage * (S(4) * gate.right * gate.wrong) * slope, zero, zero};
}

// `slope`: the derivative of the ratio at the log-probability.
template <class V, class S>
inline TokenResult<V> policy_token(PolicyLossType type, V logps, V ratio, V advantage, V slope,
                                   const Constants<S>& k) {
  switch (type) {
    case PolicyLossType::clip:
      return clip(ratio, advantage, slope, k);
    case PolicyLossType::cispo:
      return cispo(logps, ratio, advantage, k);
    case PolicyLossType::sapo:
      return sapo(ratio, advantage, slope, k);
    default: {
      const V zero = zeros_like(ratio);
      return {-advantage * logps, -advantage, zero, zero};
    }
  }
}

// The KL term of a token: the estimators of kl_term, and the unbiased one, k3 times the ratio.
template <class S, class V>
inline KlTerm<V> policy_kl_term(KlEstimator estimator, V difference, V ratio, V slope) {
  if (estimator != KlEstimator::unbiased_k3) return kl_term<S, V>(estimator, difference);
  const auto k3 = kl_term<S, V>(KlEstimator::k3, difference);
  return {ratio * k3.value, ratio * k3.grad + slope * k3.value};
}

// The ratio of a token, or of its row, and its derivative.
template <class V>
struct Ratio {
  V value, slope;
};
template <class V>
inline Ratio<V> ratio_of(V log_ratio, V bounded, V exponential) {
  return {exponential, select(log_ratio == bounded, exponential, zeros_like(exponential))};
}

// Loss and metrics from the sums of the rows: surrogate, approx_kl, ppo_kl, clipped, dual-clipped,
// kl, entropy.
template <class S>
void write_policy_results(const PolicyOptions& o, const Weights& weights,
                          const std::vector<RowSums<kPolicyMetrics>>& sums, void* loss,
                          void* metrics) {
  double total = 0;
  RowSums<kPolicyMetrics> totals = {};
  for (size_t row = 0; row < sums.size(); ++row) {
    const double* of = sums[row].of;
    const double scale = weights.scales[row];
    totals.of[0] += scale * of[0];
    total += scale * (of[0] + weighted(o.kl_coef, of[5]) - weighted(o.entropy_coef, of[6]));
    for (int i = 1; i < kPolicyMetrics; ++i) totals.of[i] += of[i] / weights.at_least_one();
  }
  *static_cast<S*>(loss) = S(total);
  for (int i = 0; i < kPolicyMetrics; ++i) static_cast<S*>(metrics)[i] = S(totals.of[i]);
}

}  // namespace apt::APT_ISA
