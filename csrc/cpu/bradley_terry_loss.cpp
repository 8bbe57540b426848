// The loss of a reward model on preference pairs, and its gradients (Bradley & Terry 1952).
// Passes: one over the pairs. Bytes: 2 inputs (3 with margins) read, 2 gradients written a pair.
// Parallel over blocks of pairs. Accuracy: a few ulp; float64 is computed in double.
#include "bradley_terry_loss.h"

#include "pair_loss.h"

namespace apt::APT_ISA {
namespace {

// The margin over the wanted margin and the sum of the rewards of each pair of a block.
template <class T>
void read_margins(const BradleyTerryLoss& a, int64_t begin, int64_t count, ScalarOf<T>* margin,
                  ScalarOf<T>* sum) {
  using S = ScalarOf<T>;
  const T* const chosen = static_cast<const T*>(a.chosen) + begin;
  const T* const rejected = static_cast<const T*>(a.rejected) + begin;
  for (int64_t i = 0; i < count; i += kWidth<S>) {
    const int64_t left = count - i;
    const auto c = take(chosen + i, left), r = take(rejected + i, left);
    auto wanted = zeros_like(c) + S(a.margin);
    if (a.margins) wanted = take(static_cast<const S*>(a.margins) + begin + i, left);
    put(margin + i, kWidth<S>, c - r - wanted);
    put(sum + i, kWidth<S>, c + r);
  }
}

template <class S>
void run(const BradleyTerryLoss& a,
         void (*read)(const BradleyTerryLoss&, int64_t, int64_t, S*, S*)) {
  using V = VectorOf<S>;
  const S coef = a.center_coef;
  pair_losses<S>(
      a.out, [&](int64_t begin, int64_t count, S* x, S* y) { read(a, begin, count, x, y); },
      [coef](V margin, V sum) -> PairResult<V> {
        const auto l = logistic(margin);
        V loss = -l.log_right, centre = zeros_like(sum);
        if (coef != 0) {
          loss = loss + coef * (sum * sum);
          centre = 2.f * coef * sum;
        }
        return {loss, centre - l.wrong, centre + l.wrong};
      });
}

}  // namespace

void bradley_terry_loss_fwd(const BradleyTerryLoss& a) {
  if (a.dtype == DType::f64) return run<double>(a, read_margins<double>);
  run<float>(a, a.dtype == DType::f32    ? read_margins<float>
                : a.dtype == DType::bf16 ? read_margins<BFloat16>
                                         : read_margins<Half>);
}

}  // namespace apt::APT_ISA
