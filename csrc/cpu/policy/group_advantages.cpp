// The advantage of each reward in its group.
// Passes: one over the rewards; the numbers of a group stay in the cache, where ranks compare each
// with all. Bytes: the rewards read, the advantages written. Parallel over groups.
// Accuracy: computed in double, and exactly 0 in a group of equal rewards.
#include "policy/group_advantages.h"

#include "policy/token_loss.h"

namespace apt::APT_ISA {
namespace {

// The share of the others that a reward beats, ties as a half, centred: in (-1, 1).
template <class T, class S>
void rank_group(const T* rewards, int64_t size, S* out) {
  for (int64_t i = 0; i < size; ++i) {
    const auto x = to_number(rewards[i]);
    int64_t below = 0, equal = 0;
    for (int64_t j = 0; j < size; ++j) {
      below += to_number(rewards[j]) < x;
      equal += to_number(rewards[j]) == x;
    }
    const double rank = double(below) + 0.5 * double(equal - 1);
    out[i] = S((rank - 0.5 * double(size - 1)) / (0.5 * double(size)));
  }
}

template <class T, class S>
void centre_group(const GroupAdvantages& a, const T* rewards, S* out) {
  const int64_t size = a.group_size;
  const double first = to_number(rewards[0]);  // equal rewards become exact zeros
  const double others = double(std::max<int64_t>(size - 1, 1));
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < size; ++i) sum += to_number(rewards[i]) - first;
  const double mean = sum / double(size);
  const auto centred = [&](int64_t i) { return (to_number(rewards[i]) - first) - mean; };
  for (int64_t i = 0; i < size; ++i) squares += centred(i) * centred(i);
  double scale = 1;
  if (a.kind == GroupAdvantageKind::normalized) scale = 1 / (std::sqrt(squares / others) + a.eps);
  if (a.kind == GroupAdvantageKind::leave_one_out) scale = double(size) / others;
  for (int64_t i = 0; i < size; ++i) out[i] = S(centred(i) * scale);
}

template <class T>
void run(const GroupAdvantages& a) {
  using S = ScalarOf<T>;
  const int64_t work = a.kind == GroupAdvantageKind::rank ? a.group_size : 4;
  const int64_t grain = kTokenGrain / work / std::max<int64_t>(a.group_size, 1);
  parallel_for(a.groups, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const T* rewards = static_cast<const T*>(a.rewards) + group * a.group_size;
      S* out = static_cast<S*>(a.advantages) + group * a.group_size;
      if (a.kind == GroupAdvantageKind::rank) {
        rank_group(rewards, a.group_size, out);
      } else {
        centre_group(a, rewards, out);
      }
    }
  });
}

}  // namespace

void group_advantages_fwd(const GroupAdvantages& a) {
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
