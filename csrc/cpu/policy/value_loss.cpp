// The loss of value functions, with clipping, its gradient and the explained variance.
// Passes: one over the mask, one for the means, one for the rest, in which the squares are centred.
// Bytes: values and returns read twice, old values once, the gradient written once. Parallel over
// rows; the order of the sums is fixed. Accuracy: a few ulp a token, sums in double.
#include "policy/value_loss.h"

#include "policy/token_loss.h"

namespace apt::APT_ISA {
namespace {

constexpr int kSums = 4;  // losses, clipped tokens, squares of R and of R - v around their means

template <class T>
class Rows {
  using S = ScalarOf<T>;
  using V = VectorOf<S>;

 public:
  explicit Rows(const ValueLoss& a)
      : a_(a), weights_(a.tokens), means_(size_t(a.tokens.rows)), sums_(size_t(a.tokens.rows)) {}

  void run() {
    find_pivot();
    for_rows(a_.tokens, [this](int64_t row) { sum_row(row); });
    const double count = weights_.at_least_one();
    double returns = 0, errors = 0;
    for (const auto& row : means_) {
      returns += row.of[0] / count;
      errors += row.of[1] / count;
    }
    mean_return_ = S(returns);
    mean_error_ = S(errors);
    for_rows(a_.tokens, [this](int64_t row) { run_row(row); });
    double loss = 0, clipped = 0, spread = 0, unexplained = 0;
    for (int64_t row = 0; row < a_.tokens.rows; ++row) {
      loss += weights_.scales[row] * sums_[row].of[0];
      clipped += sums_[row].of[1];
      spread += sums_[row].of[2];
      unexplained += sums_[row].of[3];
    }
    // The squares are around rounded means; what that adds is known.
    const auto around = [&](double squares, double mean, double rounded) {
      return std::max(squares - double(weights_.tokens) * (mean - rounded) * (mean - rounded), 0.0);
    };
    weights_.write_scales(static_cast<S*>(a_.scales));
    spread = around(spread, returns, mean_return_);
    unexplained = around(unexplained, errors, mean_error_);
    *static_cast<S*>(a_.loss) = S(loss);
    static_cast<S*>(a_.metrics)[0] = S(clipped / count);
    static_cast<S*>(a_.metrics)[1] = S(spread > 0 ? 1 - unexplained / spread : 0);
  }

 private:
  template <class Condition>
  V read(const TokenInput& x, int64_t row, int64_t t, int64_t left, Condition counts) const {
    return load_tokens<T>(x, row, t, left, counts);
  }

  // The first return that counts. The sums of squares are of the returns' distances from it: those
  // of equal returns are 0, around a mean of 0, and have no spread.
  void find_pivot() {
    for (int64_t row = 0; row < a_.tokens.rows; ++row) {
      if (weights_.lengths[row] == 0) continue;
      const bool* mask = a_.tokens.mask + row * a_.tokens.mask_row;
      const int64_t t = std::find(mask, mask + a_.tokens.length, true) - mask;
      pivot_ = to_number(
          static_cast<const T*>(a_.returns.data)[row * a_.returns.row + t * a_.returns.step]);
      return;
    }
  }

  void sum_row(int64_t row) {
    Sum<V> returns, errors;
    if (weights_.lengths[row] > 0)
      for_tokens<S>(a_.tokens, row, [&](int64_t t, int64_t left, auto counts) {
        const V target = read(a_.returns, row, t, left, counts);
        returns.add(select(counts, target - pivot_, zeros_like(target)));
        errors.add(target - read(a_.values, row, t, left, counts));
      });
    means_[row] = {{returns.total(), errors.total()}};
  }

  void run_row(int64_t row) {
    S* const grad_values = static_cast<S*>(a_.grad_values) + row * a_.tokens.length;
    sums_[row] = {};
    if (weights_.lengths[row] == 0) {
      std::fill_n(grad_values, a_.tokens.length, S(0));
      return;
    }
    const S range = S(a_.clip_range);
    Sum<V> loss, clipped_tokens, spread, unexplained;
    for_tokens<S>(a_.tokens, row, [&](int64_t t, int64_t left, auto counts) {
      const V zero = zeros_like(V{});
      const V value = read(a_.values, row, t, left, counts);
      const V target = read(a_.returns, row, t, left, counts);
      const V error = value - target;
      V squared = error * error, grad = error;
      if (a_.old_values.data) {
        const V old = read(a_.old_values, row, t, left, counts);
        const V distance = clamp<V>(value, old - range, old + range) - target;
        const V bounded = distance * distance;
        const auto clipped = bounded > squared;
        squared = select(clipped, bounded, squared);
        grad = select(clipped, zero, grad);
        clipped_tokens.add(select(clipped, zero + S(1), zero));
      }
      store_tokens(grad_values + t, left, select(counts, grad, zero));
      const V from_mean = (target - pivot_) - mean_return_, error_from_mean = -error - mean_error_;
      loss.add(S(0.5) * squared);
      spread.add(select(counts, from_mean * from_mean, zero));
      unexplained.add(select(counts, error_from_mean * error_from_mean, zero));
    });
    sums_[row] = {{loss.total(), clipped_tokens.total(), spread.total(), unexplained.total()}};
  }

  const ValueLoss& a_;
  const Weights weights_;
  std::vector<RowSums<2>> means_;  // sums of R - pivot and of R - v
  std::vector<RowSums<kSums>> sums_;
  S pivot_ = 0, mean_return_ = 0, mean_error_ = 0;  // mean_return_: of R - pivot
};

}  // namespace

void value_loss_fwd(const ValueLoss& a) {
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
