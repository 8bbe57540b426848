// The loss of a reward model on preference pairs, and its gradients (Bradley & Terry 1952).
// Passes: one over the pairs. Bytes: 2 inputs (3 with margins) read, 2 gradients written a pair.
// Parallel over blocks of pairs. Accuracy: a few ulp; float64 is computed in double.
#include "preference/bradley_terry_loss.h"

#include "preference/pair_loss.h"

namespace apt::APT_ISA {
namespace {

template <class V>
struct LossOfPairs {
  using S = ScalarOf<V>;
  Numbers<V> chosen, rejected, margins;
  S margin, center_coef;
  PairResult<V> operator()(int64_t i, int64_t left) const {
    const V c = chosen.at(i, left), r = rejected.at(i, left), sum = c + r;
    V x = c - r;
    x = margins.data ? x - margins.at(i, left) : x - margin;
    const auto l = logistic(x);
    V loss = -l.log_right, centre = zeros_like(sum);
    if (center_coef != 0) {
      loss = loss + center_coef * (sum * sum);
      centre = 2.f * center_coef * sum;
    }
    return {loss, centre - l.wrong, centre + l.wrong};
  }
};

template <class V>
void run(const BradleyTerryLoss& a) {
  using S = ScalarOf<V>;
  pair_losses<V>(a.out, LossOfPairs<V>{{a.chosen, a.dtype},
                                       {a.rejected, a.dtype},
                                       {a.margins, DType::f32},
                                       S(a.margin),
                                       S(a.center_coef)});
}

}  // namespace

void bradley_terry_loss_fwd(const BradleyTerryLoss& a) {
  if (a.dtype == DType::f64) {
    run<double>(a);
  } else {
    run<VecF>(a);
  }
}

}  // namespace apt::APT_ISA
