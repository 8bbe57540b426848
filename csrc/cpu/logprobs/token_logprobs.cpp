// Log-softmax gathered at token ids, with the entropy (Milakov & Gimelshein 2018).
// Passes: forward one read of the logits; backward one read and one write. Saves lse, entropy.
// Bytes: N V s forward, 2 N V s backward (s = element size). Parallel over rows.
// Accuracy: block sums in float, rows in double; float64 logits are computed in double.
#include "logprobs/token_logprobs.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "common/softmax_row.h"

namespace apt::APT_ISA {
namespace {

template <class T>
const T* row_logits(const TokenLogprobs& a, int64_t row) {
  return static_cast<const T*>(a.logits) + row / a.inner * a.outer_stride +
         row % a.inner * a.inner_stride;
}

template <class A>
A row_temperature(const TokenLogprobs& a, int64_t row) {
  return a.temperatures ? static_cast<const A*>(a.temperatures)[row] : A(a.temperature);
}

int64_t out_of_range(const TokenLogprobs& a, int64_t row) {
  const int64_t* ids = a.token_ids + row * a.ids_per_row;
  for (int64_t k = 0; k < a.ids_per_row; ++k)
    if (ids[k] < 0 || ids[k] >= a.vocab) return row * a.ids_per_row + k;
  return -1;
}

bool masked(const TokenLogprobs& a, int64_t row) { return a.mask && !a.mask[row]; }

// A log-sum-exp as two floats in the 8 bytes of a saved one: log p = (z - high) - low. Rounded to
// double, an lse beyond 1e15 would lose the logarithm of the sum.
struct SavedLse {
  float high, low;
  static constexpr double kLargestSummed = 1 << 20;  // the sum's low part has an error of 4e-9
  static void write(const RowStats& stats, double log_sum, double* to) {
    SavedLse saved{float(stats.shift), float(log_sum)};  // the shift is a float
    if (std::abs(stats.shift) <= kLargestSummed) {
      const double lse = stats.shift + log_sum;
      saved.high = float(lse);
      saved.low = float(lse - saved.high);
    }
    std::memcpy(to, &saved, sizeof saved);
  }
  static SavedLse read(const double* from) {
    SavedLse saved;
    std::memcpy(&saved, from, sizeof saved);
    return saved;
  }
};
static_assert(sizeof(SavedLse) == sizeof(double));

template <bool kEntropy, bool kTransform, class T>
void forward_row(const TokenLogprobs& a, int64_t row) {
  const T* x = row_logits<T>(a, row);
  const Logit<kTransform> logit{row_temperature<float>(a, row), float(a.softcap)};
  RowStats stats = empty_row();
  add_columns<kEntropy>(stats, x, a.vocab, logit);
  const double log_sum = std::log(stats.sum_exp);
  SavedLse::write(stats, log_sum, a.lse + row);
  if constexpr (kEntropy) static_cast<float*>(a.entropy)[row] = float(stats.entropy());
  const int64_t first = row * a.ids_per_row;
  for (int64_t k = first; k < first + a.ids_per_row; ++k)
    static_cast<float*>(a.logps)[k] =
        float((logit(to_float(x[a.token_ids[k]])) - stats.shift) - log_sum);
}

// Sum of the upstream gradients of one id: a row may gather the same column twice.
template <class A>
A gathered_gradient(const TokenLogprobs& a, const A* grad, int64_t first, int64_t k) {
  A total = 0;
  for (int64_t j = first; j < first + a.ids_per_row; ++j)
    if (a.token_ids[j] == a.token_ids[k]) total += grad[j];
  return total;
}

template <class A>
A gradient_sum(const TokenLogprobs& a, const A* grad, int64_t first) {
  A total = 0;
  for (int64_t k = first; k < first + a.ids_per_row; ++k) total += grad[k];
  return total;
}

template <bool kEntropy, bool kTransform, class T>
void backward_row(const TokenLogprobs& a, int64_t row) {
  const T* x = row_logits<T>(a, row);
  T* out = static_cast<T*>(a.grad_logits) + row * a.vocab;
  const float* grad = static_cast<const float*>(a.grad_logps);
  const int64_t first = row * a.ids_per_row;
  const SavedLse lse = SavedLse::read(a.lse + row);
  RowGradient<kEntropy, kTransform> gradient{
      {row_temperature<float>(a, row), float(a.softcap)},
      lse.high,
      lse.low,
      gradient_sum(a, grad, first),
      kEntropy ? static_cast<const float*>(a.grad_entropy)[row] : 0.f,
      kEntropy ? static_cast<const float*>(a.entropy)[row] : 0.f};
  write_gradient(x, out, a.vocab, gradient);
  for (int64_t k = first; k < first + a.ids_per_row; ++k) {
    const int64_t id = a.token_ids[k];
    from_float(gradient.gathered(to_float(x[id]), gathered_gradient(a, grad, first, k)), out + id);
  }
}

// float64: plain loops, for checking rather than for speed; the statistics are computed again for
// the gradient, as they are two doubles.
struct DoubleLogit {
  double temperature, softcap;
  double operator()(double x) const {
    if (softcap > 0 && x != -kInf) x = softcap * std::tanh(x / softcap);
    return x / temperature;
  }
  double slope(double x) const {
    const double t = softcap > 0 && x != -kInf ? std::tanh(x / softcap) : 0;
    return (1 - t * t) / temperature;
  }
};

RowStats double_stats(const TokenLogprobs& a, const double* x, DoubleLogit logit) {
  RowStats stats = empty_row();
  for (int64_t i = 0; i < a.vocab; ++i) {
    const double z = logit(x[i]);
    if (z > stats.shift || z != z) stats.shift = z;
  }
  for (int64_t i = 0; i < a.vocab; ++i) {
    const double d = logit(x[i]) - stats.shift, e = std::exp(d);
    stats.sum_exp += e;
    stats.sum_zexp += e == 0 ? 0 : d * e;
  }
  return stats;
}

void forward_row_double(const TokenLogprobs& a, int64_t row) {
  const double* x = row_logits<double>(a, row);
  const DoubleLogit logit{row_temperature<double>(a, row), a.softcap};
  const RowStats stats = double_stats(a, x, logit);
  a.lse[row] = stats.lse();
  if (a.return_entropy) static_cast<double*>(a.entropy)[row] = stats.entropy();
  const int64_t first = row * a.ids_per_row;
  for (int64_t k = first; k < first + a.ids_per_row; ++k)
    static_cast<double*>(a.logps)[k] = stats.log_probability(logit(x[a.token_ids[k]]));
}

void backward_row_double(const TokenLogprobs& a, int64_t row) {
  const double* x = row_logits<double>(a, row);
  double* out = static_cast<double*>(a.grad_logits) + row * a.vocab;
  const double* grad = static_cast<const double*>(a.grad_logps);
  const int64_t first = row * a.ids_per_row;
  const DoubleLogit logit{row_temperature<double>(a, row), a.softcap};
  const RowStats stats = double_stats(a, x, logit);
  const double g = gradient_sum(a, grad, first);
  const double e = a.grad_entropy ? static_cast<const double*>(a.grad_entropy)[row] : 0;
  const double entropy = a.grad_entropy ? static_cast<const double*>(a.entropy)[row] : 0;
  for (int64_t i = 0; i < a.vocab; ++i) {
    const double log_p = stats.log_probability(logit(x[i])), p = std::exp(log_p);
    out[i] = -p * (g + e * (p == 0 ? 0 : log_p + entropy)) * logit.slope(x[i]);
  }
  for (int64_t k = first; k < first + a.ids_per_row; ++k)
    out[a.token_ids[k]] += grad[k] * logit.slope(x[a.token_ids[k]]);
}

template <class T>
void zero_row(void* out, int64_t first, int64_t count) {
  if (out) std::fill_n(static_cast<T*>(out) + first, count, T{});
}

using RowFunction = void (*)(const TokenLogprobs&, int64_t);

template <class T>
RowFunction forward_of(bool entropy, bool transform) {
  if (transform) return entropy ? forward_row<true, true, T> : forward_row<false, true, T>;
  return entropy ? forward_row<true, false, T> : forward_row<false, false, T>;
}

template <class T>
RowFunction backward_of(bool entropy, bool transform) {
  if (transform) return entropy ? backward_row<true, true, T> : backward_row<false, true, T>;
  return entropy ? backward_row<true, false, T> : backward_row<false, false, T>;
}

}  // namespace

int64_t token_logprobs_fwd(const TokenLogprobs& a) {
  const bool transform = a.temperatures || a.temperature != 1 || a.softcap > 0;
  const RowFunction forward =
      a.dtype == DType::f64    ? forward_row_double
      : a.dtype == DType::f32  ? forward_of<float>(a.return_entropy, transform)
      : a.dtype == DType::bf16 ? forward_of<BFloat16>(a.return_entropy, transform)
                               : forward_of<Half>(a.return_entropy, transform);
  std::atomic<int64_t> bad{-1};
  parallel_for(a.outer * a.inner, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (masked(a, row)) {
        const auto zero = a.dtype == DType::f64 ? zero_row<double> : zero_row<float>;
        zero(a.logps, row * a.ids_per_row, a.ids_per_row);
        a.lse[row] = 0;
        if (a.return_entropy) zero(a.entropy, row, 1);
      } else if (const int64_t at = out_of_range(a, row); at >= 0) {
        bad = at;
      } else {
        forward(a, row);
      }
    }
  });
  return bad;
}

void token_logprobs_bwd(const TokenLogprobs& a) {
  const bool transform = a.temperatures || a.temperature != 1 || a.softcap > 0;
  const bool entropy = a.grad_entropy != nullptr;
  const RowFunction backward = a.dtype == DType::f64    ? backward_row_double
                               : a.dtype == DType::f32  ? backward_of<float>(entropy, transform)
                               : a.dtype == DType::bf16 ? backward_of<BFloat16>(entropy, transform)
                                                        : backward_of<Half>(entropy, transform);
  const auto zero = a.dtype == DType::f64   ? zero_row<double>
                    : a.dtype == DType::f32 ? zero_row<float>
                                            : zero_row<uint16_t>;
  parallel_for(a.outer * a.inner, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (masked(a, row)) {
        zero(a.grad_logits, row * a.vocab, a.vocab);
      } else {
        backward(a, row);
      }
    }
  });
}

}  // namespace apt::APT_ISA
