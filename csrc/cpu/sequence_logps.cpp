// Sums (or means) of the log-probabilities of a sequence where the mask counts.
// Passes: one; two over the mask for the gradient of a mean. Bytes: the log-probabilities and the
// mask read, or the mask read and the gradient written. Parallel over rows.
// Accuracy: summed in double.
#include "sequence_logps.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for: 5 us

int64_t rows_of_grain(const SequenceLogps& a) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(a.length, 1));
}

int64_t tokens(const bool* mask, int64_t length) {
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) count += mask[i];
  return std::max<int64_t>(count, 1);
}

double to_number(double x) { return x; }
template <class T>
float to_number(T x) {
  return to_float(x);
}

// Independent partial sums, which the compiler keeps in vectors.
constexpr int kPartials = 16;

template <class T>
double masked_sum(const T* x, int64_t stride, const bool* mask, int64_t length) {
  double sums[kPartials] = {}, total = 0;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kPartials <= length; i += kPartials)
      for (int j = 0; j < kPartials; ++j) sums[j] += mask[i + j] ? to_number(x[i + j]) : 0;
  }
  for (; i < length; ++i) total += mask[i] ? to_number(x[i * stride]) : 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <class T, class S>
void forward(const SequenceLogps& a) {
  parallel_for(a.rows, rows_of_grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool* mask = a.mask + row * a.length;
      const double sum = masked_sum(static_cast<const T*>(a.logps) + row * a.row_stride,
                                    a.column_stride, mask, a.length);
      static_cast<S*>(a.sums)[row] = S(a.average ? sum / tokens(mask, a.length) : sum);
    }
  });
}

template <class S>
void backward(const SequenceLogps& a) {
  parallel_for(a.rows, rows_of_grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool* mask = a.mask + row * a.length;
      S* out = static_cast<S*>(a.grad_logps) + row * a.length;
      S grad = static_cast<const S*>(a.grad)[row];
      if (a.average) grad /= tokens(mask, a.length);
      for (int64_t i = 0; i < a.length; ++i) out[i] = mask[i] ? grad : S(0);
    }
  });
}

}  // namespace

void sequence_logps_fwd(const SequenceLogps& a) {
  switch (a.dtype) {
    case DType::f32:
      return forward<float, float>(a);
    case DType::bf16:
      return forward<BFloat16, float>(a);
    case DType::f16:
      return forward<Half, float>(a);
    case DType::f64:
      return forward<double, double>(a);
  }
}

void sequence_logps_bwd(const SequenceLogps& a) {
  if (a.dtype == DType::f64) return backward<double>(a);
  backward<float>(a);
}

}  // namespace apt::APT_ISA
