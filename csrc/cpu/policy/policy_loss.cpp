// The losses of policy optimisation (PPO, GRPO and family), their metrics and their gradients.
// Passes: one over the mask, which gives the denominators, one over everything; a ratio of
// sequences takes another over its row. Bytes: every input read once, the gradients written once.
// Parallel over rows; the order of the sums is fixed. Accuracy: a few ulp a token, sums in double.
#include "policy/policy_loss.h"

#include "policy/policy_token.h"

namespace apt::APT_ISA {
namespace {

template <class T>
class Rows {
  using S = ScalarOf<T>;
  using V = VectorOf<S>;

 public:
  explicit Rows(const PolicyLoss& a)
      : a_(a), k_(a.options), weights_(a.tokens), sums_(size_t(a.tokens.rows)) {}

  void run() {
    for_rows(a_.tokens, [this](int64_t row) { run_row(row); });
    write_policy_results<S>(a_.options, weights_, sums_, a_.loss, a_.metrics);
    weights_.write_scales(static_cast<S*>(a_.scales));
  }

 private:
  template <class Condition>
  V read(const TokenInput& x, int64_t row, int64_t t, int64_t left, Condition counts) const {
    return load_tokens<T>(x, row, t, left, counts);
  }
  template <class Condition>
  V log_ratio(V logps, int64_t row, int64_t t, int64_t left, Condition counts) const {
    if (!a_.old_logps.data) return zeros_like(logps);
    return logps - read(a_.old_logps, row, t, left, counts);
  }

  // The ratio of the whole row: of the mean of its log-ratios.
  Ratio<V> ratio_of_row(int64_t row) const {
    Sum<V> sum;
    for_tokens<S>(a_.tokens, row, [&](int64_t t, int64_t left, auto counts) {
      sum.add(log_ratio(read(a_.logps, row, t, left, counts), row, t, left, counts));
    });
    const V mean = zeros_like(V{}) + S(sum.total() / weights_.lengths[row]);
    const V bounded = bounded_log_ratio<V>(mean, S(kLogRatioBound));
    return ratio_of<V>(mean, bounded, exp(bounded));
  }

  void run_row(int64_t row) {
    S* const grad_logps = static_cast<S*>(a_.grad_logps) + row * a_.tokens.length;
    S* const grad_entropy =
        a_.grad_entropy ? static_cast<S*>(a_.grad_entropy) + row * a_.tokens.length : nullptr;
    RowSums<kPolicyMetrics>& out = sums_[row];
    out = {};
    if (weights_.lengths[row] == 0) {
      std::fill_n(grad_logps, a_.tokens.length, S(0));
      if (grad_entropy) std::fill_n(grad_entropy, a_.tokens.length, S(0));
      return;
    }
    const S entropy_grad = S(-a_.options.entropy_coef);
    Ratio<V> of_row = {};
    if (a_.options.sequence_level) of_row = ratio_of_row(row);
    Sum<V> loss, approx_kl, log_ratios, clipped, dual_clipped, kl_sum, entropy_sum;
    for_tokens<S>(a_.tokens, row, [&](int64_t t, int64_t left, auto counts) {
      const V zero = zeros_like(V{});
      const V logps = read(a_.logps, row, t, left, counts);
      const V advantage = read(a_.advantages, row, t, left, counts);
      const V x = log_ratio(logps, row, t, left, counts);
      const V bounded = bounded_log_ratio<V>(x, S(kLogRatioBound)), e = exp(bounded);
      const Ratio<V> ratio = a_.options.sequence_level ? of_row : ratio_of<V>(x, bounded, e);
      auto token = policy_token<V>(a_.options.type, logps, ratio.value, advantage, ratio.slope, k_);
      if (a_.rollout_weights.data) {
        const V weight = read(a_.rollout_weights, row, t, left, counts);
        token.loss = token.loss * weight;
        token.grad = token.grad * weight;
      }
      if (a_.ref_logps.data) {
        const V d = logps - read(a_.ref_logps, row, t, left, counts);
        const auto kl = policy_kl_term<S, V>(a_.options.kl_estimator, d, ratio.value, ratio.slope);
        token.grad = token.grad + weighted<V>(k_.kl_coef, kl.grad);
        kl_sum.add(kl.value);
      }
      if (a_.entropy.data) entropy_sum.add(read(a_.entropy, row, t, left, counts));
      if (grad_entropy)
        store_tokens(grad_entropy + t, left, select(counts, zero + entropy_grad, zero));
      store_tokens(grad_logps + t, left, select(counts, token.grad, zero));
      loss.add(token.loss);
      approx_kl.add(exp_minus(bounded, e).expm1_minus_x);
      log_ratios.add(bounded);
      clipped.add(select(counts, token.clipped, zero));
      dual_clipped.add(select(counts, token.dual_clipped, zero));
    });
    out = {{loss.total(), approx_kl.total(), -log_ratios.total(), clipped.total(),
            dual_clipped.total(), kl_sum.total(), entropy_sum.total()}};
  }

  const PolicyLoss& a_;
  const Constants<S> k_;
  const Weights weights_;
  std::vector<RowSums<kPolicyMetrics>> sums_;
};

}  // namespace

void policy_loss_fwd(const PolicyLoss& a) {
  switch (a.dtype) {
    case DType::f32:
      return Rows<float>(a).run();
    case DType::bf16:
      return Rows<BFloat16>(a).run();
    case DType::f16:
      return Rows<Half>(a).run();
    case DType::f64:
      return Rows<double>(a).run();
  }
}

}  // namespace apt::APT_ISA
