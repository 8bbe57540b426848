// Losses of preference pairs: a function of two numbers a pair, its gradients and its sum.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "common/lanes.h"
#include "common/logistic.h"
#include "common/parallel.h"
#include "preference/pair_outputs.h"

namespace apt::APT_ISA {

// Numbers of a type known at run time: one kernel serves all of them, at the price of a branch that
// is always predicted.
template <class V>
struct Numbers {
  const void* data;
  DType dtype;
  // The vector at element i; lanes beyond the `left` that count hold -1.
  V at(int64_t i, int64_t left) const {
    if constexpr (std::is_same_v<V, double>) {
      return static_cast<const double*>(data)[i];
    } else {
      switch (dtype) {
        case DType::bf16:
          return take(static_cast<const BFloat16*>(data) + i, left);
        case DType::f16:
          return take(static_cast<const Half*>(data) + i, left);
        default:
          return take(static_cast<const float*>(data) + i, left);
      }
    }
  }
  template <class T>
  static VecF take(const T* p, int64_t left) {
    return left >= kLanes ? load(p) : load_partial(p, left, -1.f);
  }
};

inline void put(float* p, int64_t left, VecF v) {
  if (left >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, left, v);
  }
}
inline void put(double* p, int64_t, double v) { *p = v; }

// A sum of vectors with the rounding errors of its additions (Kahan): equal losses, as at the first
// step of training, would round the same way every time.
template <class V>
struct CompensatedSum {
  V sum{}, error{};
  void add(V x) {
    const V corrected = x - error, next = sum + corrected;
    error = (next - sum) - corrected;
    sum = next;
  }
};
inline double total(const CompensatedSum<double>& s) { return s.sum - s.error; }
inline double total(const CompensatedSum<VecF>& s) {
  float sums[kLanes], errors[kLanes];
  store(sums, s.sum);
  store(errors, s.error);
  double all = 0;
  for (int i = 0; i < kLanes; ++i) all += double(sums[i]) - double(errors[i]);
  return all;
}
// The first `count` lanes, 0 in the others.
inline double first_lanes(double x, int64_t) { return x; }
inline VecF first_lanes(VecF x, int64_t count) {
  float lanes[kLanes];
  store(lanes, x);
  return load_partial(lanes, count, 0.f);
}

template <class V>
struct PairResult {
  V loss, grad_chosen, grad_rejected;
};

// The sum of the losses of pairs [first, end) where one of them is infinite: the error of an
// addition to infinity would be inf - inf.
template <class V, class LossOf>
double plain_sum(const LossOf& loss_of, int64_t first, int64_t end) {
  double sum = 0;
  for (int64_t i = first; i < end; i += kWidth<V>) {
    const int64_t left = std::min<int64_t>(end - i, kWidth<V>);
    sum += total(CompensatedSum<V>{first_lanes(loss_of(i, left).loss, left)});
  }
  return sum;
}

constexpr int64_t kPairBlock = 1024;  // pairs of one partial sum
constexpr int64_t kGrain = 16;        // blocks worth waking a thread for: 20 us

// Reduces loss_of(i, left), the losses of the pairs from i on of which `left` exist, and writes
// their gradients. One pass; threads over blocks. The order of the sum depends on the number of
// pairs alone (and on the width of a vector), not on the threads.
template <class V, class LossOf>
void pair_losses(const PairOutputs& out, const LossOf& shared_loss_of) {
  using S = ScalarOf<V>;
  const int64_t pairs = out.pairs, blocks = (pairs + kPairBlock - 1) / kPairBlock;
  const bool reduced = out.reduction != Reduction::none;
  const double scale = out.reduction == Reduction::mean ? 1.0 / std::max<int64_t>(pairs, 1) : 1;
  S* const losses = static_cast<S*>(out.loss);
  S* const grads = static_cast<S*>(out.grads);
  const std::unique_ptr<double[]> totals(new double[blocks]());
  const auto run = [&, losses, grads, pairs, reduced](int64_t first, int64_t last) {
    const LossOf loss_of = shared_loss_of;  // a copy: what it holds stays in registers
    const S factor(scale);
    for (int64_t block = first; block < last; ++block) {
      CompensatedSum<V> sum;
      const int64_t end = std::min((block + 1) * kPairBlock, pairs);
      const auto emit = [&](int64_t i, int64_t left, const PairResult<V>& result) {
        if (reduced) {
          sum.add(left >= kWidth<V> ? result.loss : first_lanes(result.loss, left));
        } else {
          put(losses + i, left, result.loss);
        }
        put(grads + i, left, result.grad_chosen * factor);
        put(grads + pairs + i, left, result.grad_rejected * factor);
      };
      constexpr int kStep = kWidth<V>;
      int64_t i = block * kPairBlock;
      for (; i + kStep <= end; i += kStep) emit(i, kStep, loss_of(i, kStep));
      if (i < end) emit(i, end - i, loss_of(i, end - i));
      totals[block] = total(sum);
      if (reduced && std::isnan(totals[block])) {
        totals[block] = plain_sum<V>(loss_of, block * kPairBlock, end);
      }
    }
  };
  if (blocks <= kGrain) {
    run(0, blocks);
  } else {
    parallel_for(blocks, kGrain, run);
  }
  if (!reduced) return;
  double all = 0;
  for (int64_t block = 0; block < blocks; ++block) all += totals[block];
  *losses = S(all * scale);
}

}  // namespace apt::APT_ISA
