// Generalised advantage estimation, A_t = delta_t + gamma lambda A_(t+1) from the last step back.
// Passes: one; whitening adds two over the advantages. Bytes: rewards, values and flags read once,
// advantages and returns written once. Parallel over rows; vectors over the steps of a row (a
// prefix scan of log2(lanes) steps) or over rows where these are adjacent. float64, other strides
// and the last steps of a row go one by one. Accuracy: float; the sums of whitening in double.
#include "policy/gae.h"

#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "policy/gae_block.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // steps worth waking a thread for: 5 us
constexpr double kWhitenEpsilon = 1e-8;

int64_t rows_of_grain(const Gae& a) {
  return std::max<int64_t>(1, kGrain * a.rows / std::max<int64_t>(a.length, 1) /
                                  (a.cu_seqlens ? 1 : std::max<int64_t>(a.rows, 1)));
}

// One input of one row.
template <class T>
struct Steps {
  const T* data;
  int64_t step;
  Steps(const GaeInput& x, int64_t row, int64_t first)
      : data(x.data ? static_cast<const T*>(x.data) + row * x.row + first * x.step : nullptr),
        step(x.step) {}
  explicit operator bool() const { return data != nullptr; }
  const T& operator[](int64_t t) const { return data[t * step]; }
};

inline double to_number(double x) { return x; }
template <class T>
inline float to_number(T x) {
  return to_float(x);
}

template <class T, class S>
struct Row {
  int64_t length;
  Steps<T> rewards, values;
  Steps<bool> mask, terminated, truncated;
  Steps<S> bootstrap;
  bool bootstrap_per_step;
  S *advantages, *returns;
  int64_t out_step;

  Row(const Gae& a, int64_t row, int64_t begin, int64_t end)
      : length(end - begin),
        rewards(a.rewards, a.cu_seqlens ? 0 : row, begin),
        values(a.values, a.cu_seqlens ? 0 : row, begin),
        mask(a.mask, a.cu_seqlens ? 0 : row, begin),
        terminated(a.terminated, a.cu_seqlens ? 0 : row, begin),
        truncated(a.truncated, a.cu_seqlens ? 0 : row, begin),
        bootstrap(a.bootstrap, a.cu_seqlens && a.bootstrap_per_step ? 0 : row,
                  a.bootstrap_per_step ? begin : 0),
        bootstrap_per_step(a.bootstrap_per_step),
        advantages(static_cast<S*>(a.advantages) + (a.cu_seqlens ? 0 : row * a.out_row) +
                   begin * a.out_step),
        returns(static_cast<S*>(a.returns) + (a.cu_seqlens ? 0 : row * a.out_row) +
                begin * a.out_step),
        out_step(a.out_step) {}

  bool adjacent() const {
    const auto unit = [](const auto& x) { return !x || x.step == 1; };
    return rewards.step == 1 && values.step == 1 && out_step == 1 && unit(mask) &&
           unit(terminated) && unit(truncated) && (!bootstrap_per_step || unit(bootstrap));
  }
};

// What a step hands to the one before it.
template <class S>
struct Carry {
  S advantage = 0, value = 0;
  bool any = false;  // whether a later step counts
};

// Steps [begin, end) of a row, one by one, from the last.
template <class T, class S>
void scan_steps(const Row<T, S>& x, int64_t begin, int64_t end, S gamma, S decay, Carry<S>& carry) {
  for (int64_t t = end - 1; t >= begin; --t) {
    S advantage = 0, value = 0;
    if (!x.mask || x.mask[t]) {
      value = to_number(x.values[t]);
      const bool ends = x.terminated && x.terminated[t];
      const bool breaks = !carry.any || (x.truncated && x.truncated[t]);
      S next = carry.value;
      if (breaks) {
        const bool has_bootstrap = x.bootstrap && (x.bootstrap_per_step || !carry.any);
        next = has_bootstrap ? x.bootstrap[x.bootstrap_per_step ? t : 0] : S(0);
      }
      advantage = to_number(x.rewards[t]) + gamma * (ends ? S(0) : next) - value;
      if (!ends && !breaks) advantage += decay * carry.advantage;
      carry = {advantage, value, true};
    }
    x.advantages[t * x.out_step] = advantage;
    x.returns[t * x.out_step] = advantage + value;
  }
}

// The steps of a row whose inputs are adjacent, a vector at a time from the last whole vector.
template <class T>
void scan_vectors(const Row<T, float>& x, float gamma, float decay, Carry<float>& carry) {
  const Powers powers(decay);
  BlockCarry state{carry.advantage, carry.value, carry.any};
  for (int64_t t = x.length / kLanes * kLanes - kLanes; t >= 0; t -= kLanes) {
    const VecF rewards = load(x.rewards.data + t), values = load(x.values.data + t);
    const bool plain = state.any && (!x.mask || all_true(x.mask.data + t)) &&
                       (!x.terminated || all_false(x.terminated.data + t)) &&
                       (!x.truncated || all_false(x.truncated.data + t));
    BlockResult result;
    if (plain) {
      result = scan_plain(rewards, values, gamma, powers, state);
    } else {
      BlockFlags flags;
      flags.counts = x.mask ? load_flags(x.mask.data + t) : VecI{} - 1;
      flags.ends = x.terminated ? load_flags(x.terminated.data + t) : VecI{};
      flags.breaks = x.truncated ? load_flags(x.truncated.data + t) : VecI{};
      if (x.bootstrap_per_step) {
        flags.after_break = flags.after_last = load(x.bootstrap.data + t);
      } else {
        flags.after_break = VecF{};
        flags.after_last = splat(x.bootstrap ? x.bootstrap[0] : 0.f);
      }
      result = scan_flagged(rewards, values, flags, gamma, decay, state);
    }
    store(x.advantages + t, result.advantages);
    store(x.returns + t, result.returns);
  }
}

template <class T, class S>
void scan_row(const Row<T, S>& x, S gamma, S decay) {
  Carry<S> carry;
  if constexpr (std::is_same_v<S, float>) {
    if (x.length >= kLanes && x.adjacent()) {
      scan_steps(x, x.length / kLanes * kLanes, x.length, gamma, decay, carry);
      return scan_vectors(x, gamma, decay, carry);
    }
  }
  scan_steps(x, 0, x.length, gamma, decay, carry);
}

constexpr int kPanel = 32;  // vectors of adjacent rows scanned together: their carries stay in L1

struct ColumnCarry {
  VecF advantage[kPanel], value[kPanel];
  VecI any[kPanel];
};

// Step t of kLanes adjacent rows from `row` on.
template <class T>
void scan_column(const Gae& a, int64_t row, int64_t t, ColumnCarry& carry, int i) {
  const auto at = [&](const GaeInput& x) { return row + t * x.step; };
  const auto flags = [&](const GaeInput& x, VecI absent) {
    return x.data ? load_flags(static_cast<const bool*>(x.data) + at(x)) : absent;
  };
  const float gamma = float(a.gamma), decay = float(a.gamma * a.gae_lambda);
  const VecI counts = flags(a.mask, VecI{} - 1), ends = flags(a.terminated, VecI{});
  const VecI last = ~carry.any[i], breaks = flags(a.truncated, VecI{}) | last;
  const VecF reward = load(static_cast<const T*>(a.rewards.data) + at(a.rewards));
  const VecF value = load(static_cast<const T*>(a.values.data) + at(a.values));
  VecF after = {};
  if (a.bootstrap.data) {
    const float* bootstrap = static_cast<const float*>(a.bootstrap.data) + row;
    after = a.bootstrap_per_step ? load(bootstrap + t * a.bootstrap.step)
                                 : select(last, load(bootstrap), VecF{});
  }
  const VecF next = select(ends, VecF{}, select(breaks, after, carry.value[i]));
  const VecF delta = reward + gamma * next - value;
  const VecF advantage = select(ends | breaks, delta, delta + decay * carry.advantage[i]);
  const int64_t out = row + t * a.out_step;
  store(static_cast<float*>(a.advantages) + out, select(counts, advantage, VecF{}));
  store(static_cast<float*>(a.returns) + out, select(counts, advantage + value, VecF{}));
  carry.advantage[i] = select(counts, advantage, carry.advantage[i]);
  carry.value[i] = select(counts, value, carry.value[i]);
  carry.any[i] |= counts;
}

template <class T>
void scan_columns(const Gae& a) {
  const int64_t vectors = a.rows / kLanes;
  const int64_t grain = std::max<int64_t>(4, kGrain / kLanes / std::max<int64_t>(a.length, 1));
  parallel_for(vectors, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kPanel) {
      const int count = int(std::min<int64_t>(kPanel, end - first));
      ColumnCarry carry = {};
      for (int64_t t = a.length - 1; t >= 0; --t)
        for (int i = 0; i < count; ++i) scan_column<T>(a, (first + i) * kLanes, t, carry, i);
    }
  });
}

bool rows_adjacent(const Gae& a) {
  const auto unit = [](const GaeInput& x) { return x.data == nullptr || x.row == 1; };
  return a.cu_seqlens == nullptr && a.rows >= kLanes && a.out_row == 1 && unit(a.rewards) &&
         unit(a.values) && unit(a.mask) && unit(a.terminated) && unit(a.truncated) &&
         unit(a.bootstrap);
}

template <class T, class S>
void scan(const Gae& a) {
  const S gamma = S(a.gamma), decay = S(a.gamma * a.gae_lambda);
  int64_t done = 0;
  if constexpr (std::is_same_v<S, float>) {
    if (rows_adjacent(a)) {
      scan_columns<T>(a);
      done = a.rows / kLanes * kLanes;
    }
  }
  parallel_for(a.rows - done, rows_of_grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t row = done + begin; row < done + end; ++row) {
      const int64_t first = a.cu_seqlens ? a.cu_seqlens[row] : 0;
      const int64_t last = a.cu_seqlens ? a.cu_seqlens[row + 1] : a.length;
      scan_row(Row<T, S>(a, row, first, last), gamma, decay);
    }
  });
}

// The sum of term(i) over `size` elements, in an order that depends on the size alone.
template <class Term>
double block_sum(int64_t size, const Term& term) {
  const int64_t blocks = (size + kGrain - 1) / kGrain;
  const std::unique_ptr<double[]> totals(new double[blocks]());
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    constexpr int kPartials = 16;  // which the compiler keeps in vectors
    for (int64_t block = begin; block < end; ++block) {
      double sums[kPartials] = {};
      int64_t i = block * kGrain;
      const int64_t last = std::min(size, i + kGrain);
      for (; i + kPartials <= last; i += kPartials)
        for (int j = 0; j < kPartials; ++j) sums[j] += term(i + j);
      for (; i < last; ++i) sums[0] += term(i);
      for (const double sum : sums) totals[block] += sum;
    }
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += totals[block];
  return total;
}

template <class S>
void whiten(const Gae& a) {
  S* const advantages = static_cast<S*>(a.advantages);
  const bool* const mask = a.flat_mask;
  const int64_t size = a.cu_seqlens ? a.length : a.rows * a.length;
  double count = double(size);
  if (mask) count = block_sum(size, [mask](int64_t i) { return double(mask[i]); });
  const double mean =
      block_sum(size, [=](int64_t i) { return double(advantages[i]); }) / std::max(count, 1.0);
  const double squares = block_sum(size, [=](int64_t i) {
    const double x = mask && !mask[i] ? 0 : advantages[i] - mean;
    return x * x;
  });
  const double variance = squares / std::max(count - 1, 1.0);
  const double scale = 1 / std::sqrt(variance + kWhitenEpsilon);
  parallel_for(size, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      advantages[i] = mask && !mask[i] ? S(0) : S((advantages[i] - mean) * scale);
  });
}

}  // namespace

void gae_fwd(const Gae& a) {
  switch (a.dtype) {
    case DType::f32:
      scan<float, float>(a);
      break;
    case DType::bf16:
      scan<BFloat16, float>(a);
      break;
    case DType::f16:
      scan<Half, float>(a);
      break;
    case DType::f64:
      scan<double, double>(a);
  }
  if (!a.whiten) return;
  if (a.dtype == DType::f64) return whiten<double>(a);
  whiten<float>(a);
}

}  // namespace apt::APT_ISA
