// The losses of policy optimisation from hidden states, with their gradients and metrics.
// Flops (M tokens that count): 2 M D V for the log-probabilities, 2 M D V for each gradient; for
// ratios of sequences and for the gradient of 16-bit weights 2 M D V more, as these need all rows
// first. Bytes and workspace: as linear_cross_entropy.
// Parallel over the vocabulary. Accuracy: as token_logprobs, a token's loss and sums in double.
#include "policy/linear_policy_loss.h"

#include "head/loss.h"
#include "policy/policy_token.h"

namespace apt::APT_ISA {
namespace {

bool transforms(const LinearPolicyLoss& a) {
  return a.temperature_tensor || a.temperature != 1 || a.head.softcap > 0;
}

template <class T, class P>
class LinearRows {
 public:
  using A = typename P::Scalar;
  LinearRows(const LinearPolicyLoss& a, const std::vector<int64_t>& rows)
      : a_(a),
        k_(a.options),
        rows_(rows),
        tiles_(a.head),
        functions_(row_functions<A>(true, transforms(a))),
        weights_(a.tokens),
        from_chunks_(!a.options.sequence_level &&
                     (Tiles<T, P>::kSame || !(a.head.grad_weight || a.head.grad_bias))),
        lse_(rows.size()),
        grads_(rows.size()),
        logps_(rows.size()),
        entropies_(rows.size()),
        ratios_(a.options.sequence_level ? a.tokens.rows : 0),
        sums_(a.tokens.rows) {}

  void run() {
    const bool entropy = a_.options.entropy_coef != 0;
    if (!rows_.empty())
      run_linear_loss(tiles_, rows_, functions_, row_functions<A>(entropy, transforms(a_)),
                      from_chunks_, {false, false, false}, *this);
    write_policy_results<A>(a_.options, weights_, sums_, a_.loss, a_.metrics);
  }

  RowTerms terms(int64_t i) const {
    const int64_t row = rows_[i];
    RowTerms t{};
    t.token = a_.token_ids[row];
    t.temperature =
        a_.temperature_tensor ? static_cast<const A*>(a_.temperature_tensor)[row] : a_.temperature;
    t.lse = lse_[i];
    t.grad = t.pick = grads_[i];
    t.grad_entropy =
        -a_.options.entropy_coef * a_.upstream * weights_.scales[row / a_.tokens.length];
    t.entropy = entropies_[i];
    return t;
  }

  void finish_rows(const HeadStatistics<T, P>& statistics, int64_t start, int64_t size) {
    parallel_for(size, 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const RowStats stats = statistics.stats(i);
        const double temperature = terms(start + i).temperature;
        const double z = functions_.logit(statistics.token_logit(i), temperature, a_.head.softcap);
        lse_[start + i] = stats.lse();
        logps_[start + i] = stats.log_probability(z);
        entropies_[start + i] = stats.entropy();
      }
    });
    if (from_chunks_) finish_tokens(start, size);
  }

  void finish() {
    if (from_chunks_) return;
    if (a_.options.sequence_level) find_ratios();
    finish_tokens(0, int64_t(rows_.size()));
  }

 private:
  // One number a token or one a row.
  double at(const TokenInput& x, int64_t token) const {
    const int64_t row = token / a_.tokens.length, t = token % a_.tokens.length;
    return static_cast<const A*>(x.data)[row * x.row + t * x.step];
  }
  double log_ratio(int64_t i) const {
    return a_.old_logps.data ? logps_[i] - at(a_.old_logps, rows_[i]) : 0;
  }

  static Ratio<double> ratio_from(double log_ratio) {
    const double bounded = bounded_log_ratio<double>(log_ratio, kLogRatioBound);
    return ratio_of(log_ratio, bounded, std::exp(bounded));
  }

  void find_ratios() {
    std::vector<double> totals(a_.tokens.rows);
    for (size_t i = 0; i < rows_.size(); ++i) totals[rows_[i] / a_.tokens.length] += log_ratio(i);
    for (int64_t row = 0; row < a_.tokens.rows; ++row)
      ratios_[row] = ratio_from(totals[row] / std::max<int64_t>(weights_.lengths[row], 1));
  }

  // The gradients of the tokens' log-probabilities and what the tokens add to the sums: nothing
  // beside the products, so not in parallel.
  void finish_tokens(int64_t start, int64_t size) {
    for (int64_t i = start; i < start + size; ++i) {
      const int64_t row = rows_[i] / a_.tokens.length;
      const double logps = logps_[i], x = log_ratio(i);
      const double bounded = bounded_log_ratio<double>(x, kLogRatioBound), e = std::exp(bounded);
      const Ratio<double> ratio =
          a_.options.sequence_level ? ratios_[row] : ratio_of(x, bounded, e);
      auto token = policy_token(a_.options.type, logps, ratio.value, at(a_.advantages, rows_[i]),
                                ratio.slope, k_);
      double kl = 0;
      if (a_.rollout_weights.data) {
        const double weight = at(a_.rollout_weights, rows_[i]);
        token.loss *= weight;
        token.grad *= weight;
      }
      if (a_.ref_logps.data) {
        const auto term = policy_kl_term<double, double>(
            a_.options.kl_estimator, logps - at(a_.ref_logps, rows_[i]), ratio.value, ratio.slope);
        kl = term.value;
        token.grad += weighted(k_.kl_coef, term.grad);
      }
      grads_[i] = token.grad * a_.upstream * weights_.scales[row];
      const double added[kPolicyMetrics] = {token.loss,         exp_minus(bounded, e).expm1_minus_x,
                                            -bounded,           token.clipped,
                                            token.dual_clipped, kl,
                                            entropies_[i]};
      for (int q = 0; q < kPolicyMetrics; ++q) sums_[row].of[q] += added[q];
    }
  }

  const LinearPolicyLoss& a_;
  const Constants<double> k_;
  const std::vector<int64_t>& rows_;  // that count
  Tiles<T, P> tiles_;
  RowFunctions<A> functions_;
  const Weights weights_;
  bool from_chunks_;
  std::vector<double> lse_, grads_, logps_, entropies_;  // of rows_
  std::vector<Ratio<double>> ratios_;                    // [tokens.rows], of sequences
  std::vector<RowSums<kPolicyMetrics>> sums_;            // [tokens.rows]
};

template <class T, class P>
void forward(const LinearPolicyLoss& a, const std::vector<int64_t>& rows) {
  if (rows.empty()) zero_head_gradients(a.head);
  LinearRows<T, P>(a, rows).run();
}

}  // namespace

int64_t linear_policy_loss_fwd(const LinearPolicyLoss& a) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < a.head.rows; ++row) {
    if (!a.tokens.mask[row]) continue;
    if (a.token_ids[row] < 0 || a.token_ids[row] >= a.head.vocab) return row;
    rows.push_back(row);
  }
  with_head_products(a.head.dtype, [&](auto stored, auto products) {
    forward<decltype(stored), decltype(products)>(a, rows);
  });
  return -1;
}

}  // namespace apt::APT_ISA
