// The losses of DPO and its family, their rewards and their gradients.
// Passes: one over the pairs. Bytes: 4 inputs read, 2 rewards and 2 gradients written a pair.
// Parallel over blocks of pairs. Accuracy: a few ulp; no formula cancels or overflows for finite
// log-ratios, except where its value does. float64 pairs are computed in double, one by one.
#include "preference/dpo_loss.h"

#include <limits>
#include <utility>

#include "preference/pair_loss.h"

namespace apt::APT_ISA {
namespace {

// sigmoid, robust or simpo without label smoothing; `extra` is 0 for the first two
constexpr DpoLossType kPlainSigmoid = DpoLossType(kDpoLossTypes);

template <class S>
struct Constants {
  S beta, smoothing, extra, half_over_beta, robust_scale, log_right, log_wrong;
  explicit Constants(const DpoLoss& a)
      : beta(a.beta),
        smoothing(a.label_smoothing),
        extra(a.extra),
        half_over_beta(0.5 / a.beta),
        robust_scale(1 / (1 - 2 * a.label_smoothing)),
        log_right(std::log1p(-a.label_smoothing)),
        log_wrong(std::log(a.label_smoothing)) {}
};

// A loss of the difference c - r has opposite gradients.
template <class V>
PairResult<V> of_difference(V loss, V grad) {
  return {loss, grad, -grad};
}

// a b, and 0 where a is: b may be infinite there.
template <class V>
V product(V a, V b) {
  return select(a == 0.f, zeros_like(a), a * b);
}

// -(1 - s) log S(x) - s log S(-x), x = beta d - margin; `sign` -1 for robust, which adds the last.
template <class V, class S>
PairResult<V> smoothed_sigmoid(V x, S sign, const Constants<S>& k) {
  const auto l = logistic(x);
  const S right = 1 - k.smoothing, wrong = sign * k.smoothing;
  return of_difference(-right * l.log_right - wrong * l.log_wrong,
                       k.beta * (wrong * l.right - right * l.wrong));
}

// The same without smoothing, the usual case: a tenth faster.
template <class V, class S>
PairResult<V> plain_sigmoid(V x, const Constants<S>& k) {
  const auto l = logistic(x);
  return of_difference<V>(-l.log_right, -k.beta * l.wrong);
}

template <class V, class S>
PairResult<V> exo_pair(V x, const Constants<S>& k) {
  const auto l = logistic(x);
  return of_difference(product<V>(l.right, l.log_right - k.log_right) +
                           product<V>(l.wrong, l.log_wrong - k.log_wrong),
                       k.beta * product<V>(l.right * l.wrong, x - (k.log_right - k.log_wrong)));
}

// -log S(x) (1 - m) + e^-x m, m = S(x / tau); e^-x m in one exponential: it is inf * 0 else.
template <class V, class S>
PairResult<V> discopop(V x, const Constants<S>& k) {
  const auto l = logistic(x), m = logistic(x / k.extra);
  constexpr S kOverflow = std::is_same_v<S, double> ? 710 : 89;
  constexpr S kLeast = std::numeric_limits<S>::lowest();  // -inf + inf would be NaN
  const V above = select(x < kLeast, zeros_like(x) + kLeast, x);
  const V exponential = exp(vmin(zeros_like(x) + kOverflow, m.log_right - above));
  const V slope = m.right * m.wrong / k.extra;
  return of_difference(exponential - l.log_right * m.wrong,
                       k.beta * (exponential * (m.wrong / k.extra - 1.f) +
                                 product<V>(slope, l.log_right) - l.wrong * m.wrong));
}

template <class V, class S>
PairResult<V> orpo(V chosen, V rejected, const Constants<S>& k) {
  const auto c = one_minus_exp(chosen), r = one_minus_exp(rejected);
  const auto l = logistic((chosen - rejected) - (c.log - r.log));  // of the log-odds
  const V grad = -k.beta * l.wrong;
  return {-k.beta * l.log_right, grad / c.value, -grad / r.value};
}

template <class V, class S>
PairResult<V> nca_pair(V c, V r, const Constants<S>& k) {
  const auto x = logistic(k.beta * c), y = logistic(k.beta * r);
  return {-x.log_right - 0.5f * x.log_wrong - 0.5f * y.log_wrong,
          k.beta * (0.5f * x.right - x.wrong), 0.5f * k.beta * y.right};
}

template <class V, class S>
PairResult<V> bco_pair(V c, V r, const Constants<S>& k) {
  const auto x = logistic(k.beta * c), y = logistic(k.beta * r);
  return {-x.log_right - y.log_wrong, -k.beta * x.wrong, k.beta * y.right};
}

template <class V, class S>
PairResult<V> sppo_hard(V c, V r, const Constants<S>& k) {
  const V above = c - k.half_over_beta, below = r + k.half_over_beta;
  return {above * above + below * below, 2.f * above, 2.f * below};
}

template <class V, class S>
PairResult<V> apo_zero(V c, V r, const Constants<S>& k) {
  const auto x = logistic(k.beta * c), y = logistic(k.beta * r);
  return {x.wrong + y.right, -k.beta * (x.right * x.wrong), k.beta * (y.right * y.wrong)};
}

template <class V, class S>
PairResult<V> apo_down(V c, V r, const Constants<S>& k) {
  const auto x = logistic(k.beta * c), y = logistic(k.beta * (c - r));
  const V grad = k.beta * (y.right * y.wrong);
  return {x.right + y.wrong, k.beta * (x.right * x.wrong) - grad, grad};
}

// The loss of the log-ratios c and r (the policy's own log-probabilities without a reference).
template <DpoLossType kType, class V, class S>
PairResult<V> dpo_pair(V c, V r, const Constants<S>& k) {
  const V d = c - r, x = k.beta * d, zero = zeros_like(x);
  if constexpr (kType == kPlainSigmoid) {
    return plain_sigmoid<V>(x - k.extra, k);
  } else if constexpr (kType == DpoLossType::sigmoid) {
    return smoothed_sigmoid(x, S(1), k);
  } else if constexpr (kType == DpoLossType::robust) {
    const auto result = smoothed_sigmoid(x, S(-1), k);
    return of_difference<V>(k.robust_scale * result.loss, k.robust_scale * result.grad_chosen);
  } else if constexpr (kType == DpoLossType::hinge) {
    return of_difference<V>(select(x >= S(1), zero, S(1) - x),
                            select(x >= S(1), zero, zero - k.beta));
  } else if constexpr (kType == DpoLossType::ipo) {
    const V distance = d - k.half_over_beta;
    return of_difference<V>(distance * distance, 2.f * distance);
  } else if constexpr (kType == DpoLossType::exo_pair) {
    return exo_pair(x, k);
  } else if constexpr (kType == DpoLossType::nca_pair) {
    return nca_pair(c, r, k);
  } else if constexpr (kType == DpoLossType::bco_pair) {
    return bco_pair(c, r, k);
  } else if constexpr (kType == DpoLossType::sppo_hard) {
    return sppo_hard(c, r, k);
  } else if constexpr (kType == DpoLossType::apo_zero) {
    return apo_zero(c, r, k);
  } else if constexpr (kType == DpoLossType::apo_down) {
    return apo_down(c, r, k);
  } else if constexpr (kType == DpoLossType::discopop) {
    return discopop(x, k);
  } else if constexpr (kType == DpoLossType::simpo) {
    return smoothed_sigmoid<V>(x - k.extra, S(1), k);
  } else {
    return orpo(c, r, k);
  }
}

// Reads pairs, writes their rewards, and gives their losses.
template <DpoLossType kType, class V>
struct LossOfPairs {
  using S = ScalarOf<V>;
  Numbers<V> policy_chosen, policy_rejected, ref_chosen, ref_rejected;
  S *chosen_rewards, *rejected_rewards;
  Constants<S> k;
  PairResult<V> operator()(int64_t i, int64_t left) const {
    V c = policy_chosen.at(i, left), r = policy_rejected.at(i, left);
    if (ref_chosen.data) {
      c = c - ref_chosen.at(i, left);
      r = r - ref_rejected.at(i, left);
    }
    put(chosen_rewards + i, left, k.beta * c);
    put(rejected_rewards + i, left, k.beta * r);
    return dpo_pair<kType>(c, r, k);
  }
};

template <DpoLossType kType, class V>
void run(const DpoLoss& a) {
  using S = ScalarOf<V>;
  pair_losses<V>(a.out, LossOfPairs<kType, V>{{a.policy_chosen, a.dtype},
                                              {a.policy_rejected, a.dtype},
                                              {a.ref_chosen, a.dtype},
                                              {a.ref_rejected, a.dtype},
                                              static_cast<S*>(a.chosen_rewards),
                                              static_cast<S*>(a.rejected_rewards),
                                              Constants<S>(a)});
}

template <class V, int... kTypes>
void run_type(const DpoLoss& a, std::integer_sequence<int, kTypes...>) {
  const bool sigmoid = a.type == DpoLossType::sigmoid || a.type == DpoLossType::simpo ||
                       a.type == DpoLossType::robust;
  if (sigmoid && a.label_smoothing == 0) return run<kPlainSigmoid, V>(a);
  ((a.type == DpoLossType(kTypes) ? run<DpoLossType(kTypes), V>(a) : void()), ...);
}

}  // namespace

void dpo_loss_fwd(const DpoLoss& a) {
  constexpr auto kTypes = std::make_integer_sequence<int, kDpoLossTypes>();
  if (a.dtype == DType::f64) {
    run_type<double>(a, kTypes);
  } else {
    run_type<VecF>(a, kTypes);
  }
}

}  // namespace apt::APT_ISA
