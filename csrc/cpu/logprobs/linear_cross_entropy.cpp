// Cross-entropy of an output head with its gradients, formed in the forward pass.
// Flops (M rows that count): 2 M D V for the loss, 2 M D V more for each gradient. The logits of a
// chunk of rows stay until lse is known: an eighth of those of all rows, 5 MiB at least and 64 MiB
// at most.
// Bytes: weight read twice and its gradient updated once a chunk. 16-bit weights: their gradient
// needs all rows for a tile at a time, so the logits are computed again (8 M D V in all).
// Parallel over the vocabulary. Accuracy: as token_logprobs; row losses are summed in double.
#include "logprobs/linear_cross_entropy.h"

#include <atomic>
#include <vector>

#include "head/loss.h"

namespace apt::APT_ISA {
namespace {

template <class T, class P>
class CrossEntropy {
 public:
  using A = typename P::Scalar;
  CrossEntropy(LinearCrossEntropy& a, const std::vector<int64_t>& rows)
      : a_(a),
        rows_(rows),
        count_(int64_t(rows.size())),
        tiles_(a.head),
        functions_(row_functions<A>(false, a.head.softcap > 0)),
        again_(!Tiles<T, P>::kSame && (a.head.grad_weight || a.head.grad_bias)),
        lse_(count_),
        losses_(count_) {
    const double total = a.normalizer ? *a.normalizer : double(count_);
    coefficient_ = a.mean ? 1 / total : 1;
  }

  void run() {
    run_linear_loss(tiles_, rows_, functions_, functions_, !again_,
                    {false, a_.label_smoothing > 0, true}, *this);
    double loss = 0;
    for (int64_t i = 0; i < count_; ++i) loss += losses_[i];
    a_.loss = loss * coefficient_;
    a_.correct = correct_;
  }

  RowTerms terms(int64_t i) const {
    RowTerms t{};
    t.token = a_.labels[rows_[i]];
    t.temperature = 1;
    t.lse = lse_[i];
    t.grad = -coefficient_;
    t.pick = -coefficient_ * (1 - a_.label_smoothing);
    t.uniform = -coefficient_ * a_.label_smoothing / double(a_.head.vocab);
    return t;
  }

  void finish_rows(const HeadStatistics<T, P>& statistics, int64_t start, int64_t size) {
    parallel_for(size, 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const RowStats stats = statistics.stats(i);
        const A x = statistics.token_logit(i);
        const double z = functions_.logit(x, 1, a_.head.softcap);
        lse_[start + i] = stats.lse();
        double loss = -stats.log_probability(z);
        if (const double s = a_.label_smoothing; s > 0)
          loss = (1 - s) * loss -
                 s * stats.log_probability(statistics.sum_logits(i) / double(a_.head.vocab));
        losses_[start + i] = loss;
        const int64_t label = a_.labels[rows_[start + i]];
        if (stats.sum_exp == stats.sum_exp && statistics.first_largest(i) == label) ++correct_;
      }
    });
  }
  void finish() {}

 private:
  LinearCrossEntropy& a_;
  const std::vector<int64_t>& rows_;
  int64_t count_;
  Tiles<T, P> tiles_;
  RowFunctions<A> functions_;
  bool again_;  // gradients from logits that are computed again
  double coefficient_;
  std::vector<double> lse_, losses_;  // of rows_
  std::atomic<int64_t> correct_{0};
};

template <class T, class P>
void forward(LinearCrossEntropy& a, const std::vector<int64_t>& rows) {
  a.loss = 0;
  a.correct = 0;
  if (rows.empty()) return zero_head_gradients(a.head);
  CrossEntropy<T, P>(a, rows).run();
}

}  // namespace

int64_t linear_cross_entropy_fwd(LinearCrossEntropy& a) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < a.head.rows; ++row) {
    if (a.labels[row] == a.ignore_index) continue;
    if (a.labels[row] < 0 || a.labels[row] >= a.head.vocab) return row;
    rows.push_back(row);
  }
  with_head_products(a.head.dtype, [&](auto stored, auto products) {
    forward<decltype(stored), decltype(products)>(a, rows);
  });
  return -1;
}

}  // namespace apt::APT_ISA
