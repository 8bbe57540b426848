// Losses of tokens [rows, length]: masked vectors, sums in double, aggregation over rows.
#pragma once
#include <algorithm>
#include <vector>

#include "common/lanes.h"
#include "common/logistic.h"
#include "common/parallel.h"
#include "policy/token_inputs.h"

namespace apt::APT_ISA {

constexpr int64_t kTokenGrain = 4096;  // tokens worth waking a thread for: 5 us

inline double to_number(double x) { return x; }
template <class T>
inline float to_number(T x) {
  return to_float(x);
}

// Which of the next `left` tokens count, as a condition for select().
template <class S>
inline auto load_counts(const bool* mask, int64_t left) {
  if constexpr (std::is_same_v<S, double>) {
    (void)left;
    return *mask;
  } else {
    using VecU8 = uint8_t __attribute__((vector_size(kLanes)));
    VecU8 raw = {};
    std::memcpy(&raw, mask, left < kLanes ? left : kLanes);
    return VecI(__builtin_convertvector(raw, VecI) != 0);
  }
}

// The condition that every token counts.
template <class S>
inline auto every_token() {
  if constexpr (std::is_same_v<S, double>) {
    return true;
  } else {
    return VecI(VecI{} - 1);
  }
}

// The next tokens of an input; 0 where they do not count, whatever is there.
template <class T, class Condition>
inline auto load_tokens(const TokenInput& x, int64_t row, int64_t t, int64_t left,
                        Condition counts) {
  const T* p = static_cast<const T*>(x.data) + row * x.row + t * x.step;
  if constexpr (std::is_same_v<T, double>) {
    return select(counts, *p, 0.0);
  } else {
    if (x.step == 0) return select(counts, splat(to_float(*p)), VecF{});
    return select(counts, left >= kLanes ? load(p) : load_partial(p, left, 0.f), VecF{});
  }
}
inline void store_tokens(float* p, int64_t left, VecF v) {
  if (left >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, left, v);
  }
}
inline void store_tokens(double* p, int64_t, double v) { *p = v; }

// A sum in double: its error does not grow with the number of tokens.
template <class V>
struct Sum {
  using Half = float __attribute__((vector_size(kLanes * 2)));
  using Wide = double __attribute__((vector_size(kLanes * 4)));
  Wide low = {}, high = {};
  void add(VecF v) {
    Half half[2];
    std::memcpy(half, &v, sizeof half);
    low += __builtin_convertvector(half[0], Wide);
    high += __builtin_convertvector(half[1], Wide);
  }
  double total() const {
    const Wide both = low + high;
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += both[i];
    return sum;
  }
};
template <>
struct Sum<double> {
  double sum = 0;
  void add(double v) { sum += v; }
  double total() const { return sum; }
};

// e^x - 1 - x to a few ulp, and e^x - 1, from e = e^x; the plain formulas cancel near 0.
template <class V>
struct ExpMinus {
  V expm1_minus_x, expm1;
};
inline ExpMinus<double> exp_minus(double x, double) {
  const double m = std::expm1(x);
  return {m - x, m};
}
inline ExpMinus<VecF> exp_minus(VecF x, VecF e) {
  VecF poly = splat(1.f / 479001600);  // 1/12!: the next term is under 4e-10 of the sum for |x| < 1
  for (const float factorial :
       {39916800.f, 3628800.f, 362880.f, 40320.f, 5040.f, 720.f, 120.f, 24.f, 6.f, 2.f})
    poly = poly * x + 1.f / factorial;
  const VecF series = x * x * poly;
  const VecI near = vmax(x, -x) < 1.f;
  const VecF expm1 = select(near, x + series, e - 1.f);
  return {select(near, series, expm1 - x), expm1};
}

// x within [low, high]; a NaN stays NaN.
template <class V>
inline V clamp(V x, V low, V high) {
  return select(x < low, low, select(x > high, high, x));
}

// Sums of the rows of `kCount` quantities, which every row writes alone.
template <int kCount>
struct RowSums {
  double of[kCount];
};

// The tokens that count in each row, and in all; the factor of each row's losses.
struct Weights {
  std::vector<int64_t> lengths;
  std::vector<double> scales;
  int64_t tokens = 0;

  explicit Weights(const Tokens& x) : lengths(x.rows), scales(x.rows) {
    const int64_t grain = 8 * kTokenGrain / std::max<int64_t>(x.length, 1);
    parallel_for(x.rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) lengths[row] = count(x, row);
    });
    int64_t rows = 0;
    for (const int64_t length : lengths) {
      tokens += length;
      rows += length > 0;
    }
    const double scale = 1 / denominator(x, std::max<int64_t>(rows, 1));
    for (int64_t row = 0; row < x.rows; ++row) {
      const bool mean = x.aggregation == Aggregation::sequence_mean;
      scales[row] = mean ? scale / std::max<int64_t>(lengths[row], 1) : scale;
    }
  }
  template <class S>
  void write_scales(S* out) const {
    for (size_t row = 0; row < scales.size(); ++row) out[row] = S(scales[row]);
  }
  double at_least_one() const { return double(std::max<int64_t>(tokens, 1)); }

 private:
  static int64_t count(const Tokens& x, int64_t row) {
    const bool* mask = x.mask + row * x.mask_row;
    int64_t total = 0;
    constexpr int64_t kBlock = 1 << 16;  // counted in 32 bits, which makes narrower vectors
    for (int64_t t = 0; t < x.length; t += kBlock) {
      int32_t part = 0;
      for (int64_t i = t; i < std::min(x.length, t + kBlock); ++i) part += mask[i];
      total += part;
    }
    return total;
  }
  double denominator(const Tokens& x, int64_t rows) const {
    if (x.normalizer != 0) return x.normalizer;
    switch (x.aggregation) {
      case Aggregation::token_mean:
        return at_least_one();
      case Aggregation::token_sum:
        return 1;
      case Aggregation::dr_grpo:
        return double(rows) * double(std::max<int64_t>(x.length, 1));
      default:
        return double(rows);
    }
  }
};

// Calls body(row) for all rows, in threads.
template <class Body>
void for_rows(const Tokens& x, const Body& body) {
  const int64_t grain = kTokenGrain / std::max<int64_t>(x.length, 1);
  parallel_for(x.rows, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Calls body(t, left, counts) for the vectors of tokens of a row.
template <class S, class Body>
void for_tokens(const Tokens& x, int64_t row, const Body& body) {
  const bool* mask = x.mask + row * x.mask_row;
  for (int64_t t = 0; t < x.length; t += kWidth<S>)
    body(t, x.length - t, load_counts<S>(mask + t, x.length - t));
}

}  // namespace apt::APT_ISA
