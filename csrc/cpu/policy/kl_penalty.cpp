// An estimate of KL(policy || reference) at each token, or its gradient.
// Passes: one. Bytes: log-probabilities, the mask (and the upstream gradient) read, 4 written.
// Parallel over tokens. Accuracy: a few ulp, also where the policies hardly differ.
#include "policy/kl_penalty.h"

#include "policy/kl_term.h"

namespace apt::APT_ISA {
namespace {

template <class T>
void run(const KlPenalty& a) {
  using S = ScalarOf<T>;
  using V = VectorOf<S>;
  const TokenInput logps{a.logps, 0, 1}, ref_logps{a.ref_logps, 0, 1}, upstream{a.grad, 0, 1};
  parallel_for((a.size + kLanes - 1) / kLanes, kTokenGrain / kLanes, [&](int64_t b, int64_t e) {
    for (int64_t t = b * kLanes; t < std::min(e * kLanes, a.size); t += kWidth<S>) {
      const int64_t left = a.size - t;
      const auto counts = a.mask ? load_counts<S>(a.mask + t, left) : every_token<S>();
      const V d =
          load_tokens<T>(logps, 0, t, left, counts) - load_tokens<T>(ref_logps, 0, t, left, counts);
      const auto kl = kl_term<S, V>(a.estimator, d);
      V out = kl.value;
      if (a.grad) out = load_tokens<S>(upstream, 0, t, left, counts) * kl.grad;
      store_tokens(static_cast<S*>(a.out) + t, left, out);
    }
  });
}

}  // namespace

void kl_penalty(const KlPenalty& a) {
  switch (a.dtype) {
    case DType::f32:
      return run<float>(a);
    case DType::bf16:
      return run<BFloat16>(a);
    case DType::f16:
      return run<Half>(a);
    case DType::f64:
      return run<double>(a);
  }
}

}  // namespace apt::APT_ISA
