// One row of a softmax: the statistics of z = cap(x) / temperature in one read, and its gradient.
// Shared by every operation over a vocabulary.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace apt::APT_ISA {

// sum_exp = sum e^(z - shift), sum_zexp = sum (z - shift) e^(z - shift) with 0 * -inf = 0, where
// shift is the largest z or up to kSlack less.
constexpr float kSlack = 1;
struct RowStats {
  double shift, sum_exp, sum_zexp;
  double lse() const { return shift + std::log(sum_exp); }
  double log_probability(double z) const { return (z - shift) - std::log(sum_exp); }
  double entropy() const { return std::log(sum_exp) - sum_zexp / sum_exp; }
};

// Not inlined, so that equal x give equal bits wherever they are computed: the compiler contracts
// products and sums of inlined copies differently, and a vocabulary of one would not give logp 0.
__attribute__((noinline, const)) inline VecF cap_tanh(VecF x, float softcap) {
  return tanh(x / softcap);
}

// z = softcap * tanh(x / softcap) / temperature; an excluded column, x = -inf, stays -inf.
template <bool kTransform>
struct Logit {
  float temperature, softcap;
  VecF operator()(VecF x) const {
    if constexpr (kTransform) {
      if (softcap > 0.f) x = select(x == -kInf, x, softcap * cap_tanh(x, softcap));
      if (temperature != 1.f) x = x / temperature;
    }
    return x;
  }
  float operator()(float x) const { return (*this)(splat(x))[0]; }
  // dz/dx
  VecF slope(VecF x) const {
    VecF s = splat(1.f);
    if constexpr (kTransform) {
      if (softcap > 0.f) {
        const VecF t = cap_tanh(x, softcap);
        s = select(x == -kInf, s, 1.f - t * t);
      }
      s = s / temperature;
    }
    return s;
  }
};

// Online softmax over blocks that stay in the L1 cache: one reading of a block, with the shift the
// row has so far, finds its sums and its maximum; only where that is much larger, as in a row's
// first block, the maximum comes first. Vector sums hold one block only and go on in double, so the
// error does not grow with the vocabulary.
constexpr int64_t kSoftmaxBlock = 1024;

// Calls body(vector of x, u) for all of a block, u = 0 .. 3 in turn: so many sums at a time. The
// columns after the last are -inf.
template <class T, class Body>
inline void for_each_vector(const T* p, int64_t n, const Body& body) {
  constexpr int64_t kStep = 4 * kLanes;
  const int64_t whole = n / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep)
    for (int u = 0; u < 4; u += 2) {
      const T* at = p + i + u * kLanes;
      const VecPair x = load_pair(at);
      // The next block travels while this one is computed. (A hint: past the end is harmless.)
      for (size_t line = 0; line < 2 * kLanes * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(at + kSoftmaxBlock) + line);
      body(x.first, u);
      body(x.second, u + 1);
    }
  for (int64_t i = whole; i < n; i += kLanes)
    body(load_partial(p + i, std::min<int64_t>(kLanes, n - i), -kInf), 0);
}

template <class T>
inline float block_max(const T* p, int64_t n) {
  VecF best[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for_each_vector(p, n, [&](VecF x, int u) { best[u] = vmax(x, best[u]); });
  return max(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

struct BlockSums {
  float max, exp, zexp;  // max of x, not z
};

template <bool kEntropy, bool kTransform, class T>
inline BlockSums block_sums(const T* p, int64_t n, Logit<kTransform> logit, float shift) {
  VecF best[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)}, s[4] = {}, t[4] = {};
  for_each_vector(p, n, [&](VecF x, int u) {
    const VecF d = logit(x) - shift;
    // The entropy, a difference, needs every digit.
    const VecF e = kEntropy ? exp(d) : exp2(d * float(kLog2e));
    best[u] = vmax(x, best[u]);
    s[u] += e;
    if constexpr (kEntropy) t[u] += select(e == 0.f, VecF{}, d * e);
  });
  return {max(vmax(vmax(best[0], best[1]), vmax(best[2], best[3]))),
          sum((s[0] + s[1]) + (s[2] + s[3])), sum((t[0] + t[1]) + (t[2] + t[3]))};
}

inline void raise(RowStats& row, float shift) {
  if (row.shift == -kInf) {
    row.sum_exp = row.sum_zexp = 0;
  } else {
    const double change = row.shift - shift, scale = std::exp(change);
    row.sum_zexp = scale * (row.sum_zexp + change * row.sum_exp);
    row.sum_exp *= scale;
  }
  row.shift = shift;
}

template <bool kEntropy, bool kTransform, class T>
void add_columns(RowStats& row, const T* x, int64_t size, Logit<kTransform> logit) {
  for (int64_t start = 0; start < size; start += kSoftmaxBlock) {
    const T* p = x + start;
    const int64_t n = std::min(kSoftmaxBlock, size - start);
    BlockSums sums{kInf, 0, 0};
    if (row.shift != -kInf)
      sums = block_sums<kEntropy>(p, n, logit, float(row.shift));
    else
      sums.max = block_max(p, n);
    // The largest z is that of the largest x, as temperatures are above 0.
    if (const float top = logit(sums.max); top > row.shift + kSlack || row.shift == -kInf) {
      if (top == -kInf) {  // only excluded columns so far, or NaN, which no maximum keeps
        const float sum = block_sums<kEntropy>(p, n, logit, 0.f).exp;
        if (sum != sum) row = {sum, sum, sum};
        continue;
      }
      sums = block_sums<kEntropy>(p, n, logit, top);
      raise(row, top);
    }
    row.sum_exp += sums.exp;
    row.sum_zexp += sums.zexp;
  }
}

inline RowStats empty_row() { return {-kInf, 0, 0}; }

// d loss / dx of a row: (-g p - e p (z - lse + H)) dz/dx, and + g_k at the gathered columns by the
// caller (gathered()). x and out may be the same memory.
template <bool kEntropy, bool kTransform>
struct RowGradient {
  Logit<kTransform> logit;
  float lse_high, lse_low;  // a double in two parts: a float's rounding would be an error of p
  float grad_sum, grad_entropy, entropy;
  // -d loss / dz without the gathered columns
  VecF softmax_term(VecF x) const {
    const VecF log_p = (logit(x) - lse_high) - lse_low, p = exp(log_p);
    VecF g = splat(grad_sum);
    if constexpr (kEntropy) g = g + grad_entropy * select(p == 0.f, VecF{}, log_p + entropy);
    return p * g;
  }
  VecF operator()(VecF x) const { return -softmax_term(x) * logit.slope(x); }
  // The slope comes last: a vocabulary of one must give exactly 0.
  float gathered(float x, float grad) const {
    return ((grad - softmax_term(splat(x))) * logit.slope(splat(x)))[0];
  }
};

template <bool kEntropy, bool kTransform, class T>
void write_gradient(const T* x, T* out, int64_t size, RowGradient<kEntropy, kTransform> gradient) {
  constexpr int kPairs = 2, kStep = kPairs * 2 * kLanes;
  const int64_t whole = size / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep)
    for (int u = 0; u < kPairs; ++u) {
      const int64_t at = i + u * 2 * kLanes;
      const VecPair v = load_pair(x + at);
      store_pair(out + at, {gradient(v.first), gradient(v.second)});
    }
  for (int64_t i = whole; i < size; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, size - i);
    store_partial(out + i, count, gradient(load_partial(x + i, count, -kInf)));
  }
}

}  // namespace apt::APT_ISA
