// The losses of DPO and its family, their rewards and their gradients.
// Passes: one over the pairs. Bytes: 4 inputs read, 2 rewards and 2 gradients written a pair.
// Parallel over blocks of pairs. Accuracy: a few ulp; no formula cancels or overflows for finite
// log-ratios, except where its value does. float64 pairs are computed in double, one by one.
#include "dpo_loss.h"

#include <utility>

#include "pair_loss.h"

namespace apt::APT_ISA {
namespace {

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

// -(1 - s) log S(x) - s log S(-x), x = beta d - margin; `sign` -1 for robust, which adds the last.
template <class V, class S>
PairResult<V> smoothed_sigmoid(V x, S sign, const Constants<S>& k) {
  const auto l = logistic(x);
  const S right = 1 - k.smoothing, wrong = sign * k.smoothing;
  return of_difference(-right * l.log_right - wrong * l.log_wrong,
                       k.beta * (wrong * l.right - right * l.wrong));
}

template <class V, class S>
PairResult<V> exo_pair(V x, const Constants<S>& k) {
  const auto l = logistic(x);
  return of_difference(
      l.right * (l.log_right - k.log_right) + l.wrong * (l.log_wrong - k.log_wrong),
      k.beta * (l.right * l.wrong) * (x - (k.log_right - k.log_wrong)));
}

// -log S(x) (1 - m) + e^-x m, m = S(x / tau); e^-x m in one exponential: it is inf * 0 else.
template <class V, class S>
PairResult<V> discopop(V x, const Constants<S>& k) {
  const auto l = logistic(x), m = logistic(x / k.extra);
  constexpr S kOverflow = std::is_same_v<S, double> ? 710 : 89;
  const V exponential = exp(vmin(zeros_like(x) + kOverflow, m.log_right - x));
  const V slope = m.right * m.wrong / k.extra;
  return of_difference(
      exponential - l.log_right * m.wrong,
      k.beta * (exponential * (m.wrong / k.extra - 1.f) + l.log_right * slope - l.wrong * m.wrong));
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
template <DpoType kType, class V, class S>
PairResult<V> dpo_pair(V c, V r, const Constants<S>& k) {
  const V d = c - r, x = k.beta * d, zero = zeros_like(x);
  if constexpr (kType == DpoType::sigmoid) {
    return smoothed_sigmoid(x, S(1), k);
  } else if constexpr (kType == DpoType::robust) {
    const auto result = smoothed_sigmoid(x, S(-1), k);
    return of_difference<V>(k.robust_scale * result.loss, k.robust_scale * result.grad_chosen);
  } else if constexpr (kType == DpoType::hinge) {
    return of_difference<V>(select(x >= S(1), zero, S(1) - x),
                            select(x >= S(1), zero, zero - k.beta));
  } else if constexpr (kType == DpoType::ipo) {
    const V distance = d - k.half_over_beta;
    return of_difference<V>(distance * distance, 2.f * distance);
  } else if constexpr (kType == DpoType::exo_pair) {
    return exo_pair(x, k);
  } else if constexpr (kType == DpoType::nca_pair) {
    return nca_pair(c, r, k);
  } else if constexpr (kType == DpoType::bco_pair) {
    return bco_pair(c, r, k);
  } else if constexpr (kType == DpoType::sppo_hard) {
    return sppo_hard(c, r, k);
  } else if constexpr (kType == DpoType::apo_zero) {
    return apo_zero(c, r, k);
  } else if constexpr (kType == DpoType::apo_down) {
    return apo_down(c, r, k);
  } else if constexpr (kType == DpoType::discopop) {
    return discopop(x, k);
  } else if constexpr (kType == DpoType::simpo) {
    return smoothed_sigmoid<V>(x - k.extra, S(1), k);
  } else {
    return orpo(c, r, k);
  }
}

// The log-ratios of a block, and their rewards.
template <class T>
void read_ratios(const DpoLoss& a, int64_t begin, int64_t count, ScalarOf<T>* c, ScalarOf<T>* r) {
  using S = ScalarOf<T>;
  const auto at = [begin](const void* p) { return static_cast<const T*>(p) + begin; };
  S* const chosen_rewards = static_cast<S*>(a.chosen_rewards) + begin;
  S* const rejected_rewards = static_cast<S*>(a.rejected_rewards) + begin;
  for (int64_t i = 0; i < count; i += kWidth<S>) {
    const int64_t left = count - i;
    auto chosen = take(at(a.policy_chosen) + i, left);
    auto rejected = take(at(a.policy_rejected) + i, left);
    if (a.ref_chosen) {
      chosen = chosen - take(at(a.ref_chosen) + i, left);
      rejected = rejected - take(at(a.ref_rejected) + i, left);
    }
    put(c + i, kWidth<S>, chosen);
    put(r + i, kWidth<S>, rejected);
    put(chosen_rewards + i, left, S(a.beta) * chosen);
    put(rejected_rewards + i, left, S(a.beta) * rejected);
  }
}

template <class S>
using ReadRatios = void (*)(const DpoLoss&, int64_t, int64_t, S*, S*);

template <DpoType kType, class S>
void run(const DpoLoss& a, ReadRatios<S> read) {
  const Constants<S> k(a);
  using V = VectorOf<S>;
  pair_losses<S>(
      a.out, [&](int64_t begin, int64_t count, S* c, S* r) { read(a, begin, count, c, r); },
      [k](V c, V r) { return dpo_pair<kType>(c, r, k); });
}

template <class S, int... kTypes>
void run_type(const DpoLoss& a, ReadRatios<S> read, std::integer_sequence<int, kTypes...>) {
  ((a.type == DpoType(kTypes) ? run<DpoType(kTypes), S>(a, read) : void()), ...);
}

}  // namespace

void dpo_loss_fwd(const DpoLoss& a) {
  constexpr auto kTypes = std::make_integer_sequence<int, kDpoTypes>();
  if (a.dtype == DType::f64) return run_type<double>(a, read_ratios<double>, kTypes);
  run_type<float>(a,
                  a.dtype == DType::f32    ? read_ratios<float>
                  : a.dtype == DType::bf16 ? read_ratios<BFloat16>
                                           : read_ratios<Half>,
                  kTypes);
}

}  // namespace apt::APT_ISA
