// Losses of preference pairs: a function of two numbers a pair, its gradients and its sum.
#pragma once
#include <algorithm>
#include <memory>

#include "lanes.h"
#include "logistic.h"
#include "pair_outputs.h"
#include "parallel.h"

namespace apt::APT_ISA {

// The next vector of `count` numbers that are left; lanes beyond them hold -1.
template <class T>
VecF take(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, count, -1.f);
}
inline double take(const double* p, int64_t) { return *p; }
inline void put(float* p, int64_t count, VecF v) {
  if (count >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, count, v);
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

constexpr int64_t kPairBlock = 1024;  // what a block reads and computes stays in the L1 cache
constexpr int64_t kGrain = 16;        // blocks worth waking a thread for: 20 us

// read(begin, count, a, b) gives the two numbers of each pair of a block, formula(a, b) the loss.
// One pass; threads over blocks. The order of the sum depends on the number of pairs alone (and on
// the width of a vector), not on the threads.
template <class S, class Read, class Formula>
void pair_losses(const PairOutputs& out, const Read& read, const Formula& formula) {
  constexpr int kStep = kWidth<S>;
  const int64_t blocks = (out.pairs + kPairBlock - 1) / kPairBlock;
  const bool reduced = out.reduction != Reduction::none;
  const double scale = out.reduction == Reduction::mean ? 1.0 / std::max<int64_t>(out.pairs, 1) : 1;
  S* const losses = static_cast<S*>(out.loss);
  S* const grads = static_cast<S*>(out.grads);
  const std::unique_ptr<double[]> totals(new double[blocks]());
  const auto run = [&](int64_t first, int64_t last) {
    S a[kPairBlock], b[kPairBlock];
    const auto loss_of = formula;  // a copy: what it holds stays in registers
    const S factor(scale);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kPairBlock, count = std::min(kPairBlock, out.pairs - begin);
      read(begin, count, a, b);
      S* const loss = losses + begin;
      S* const grad_chosen = grads + begin;
      S* const grad_rejected = grads + out.pairs + begin;
      CompensatedSum<VectorOf<S>> sum;
      for (int64_t i = 0; i < count; i += kStep) {
        const int64_t left = count - i;
        const auto result = loss_of(take(a + i, kStep), take(b + i, kStep));
        if (reduced) {
          sum.add(left >= kStep ? result.loss : first_lanes(result.loss, left));
        } else {
          put(loss + i, left, result.loss);
        }
        put(grad_chosen + i, left, result.grad_chosen * factor);
        put(grad_rejected + i, left, result.grad_rejected * factor);
      }
      totals[block] = total(sum);
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
