// One row of a softmax: the statistics of z = cap(x) / temperature in one read, and its gradient.
// Shared by every operation over a vocabulary.
#pragma once
#include <algorithm>

#include "simd.h"

namespace apt::APT_ISA {

// sum_exp = sum e^(z - max), sum_zexp = sum (z - max) e^(z - max) with 0 * -inf = 0.
struct RowStats {
  double max, sum_exp, sum_zexp;
  double lse() const { return max + std::log(sum_exp); }
  double log_probability(double z) const { return (z - max) - std::log(sum_exp); }
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

// Online softmax over blocks that stay in the L1 cache: first the block's maximum, then its
// exponentials. Vector sums hold one block only and go on in double, so the error does not grow
// with the vocabulary.
constexpr int64_t kSoftmaxBlock = 1024;

template <bool kEntropy>
inline void merge_block(RowStats& row, float block_max, VecF sum_exp, VecF sum_zexp) {
  if (row.max == -kInf) {
    row.sum_exp = row.sum_zexp = 0;
  } else if (block_max > row.max) {
    const double shift = row.max - block_max, scale = std::exp(shift);
    row.sum_zexp = scale * (row.sum_zexp + shift * row.sum_exp);
    row.sum_exp *= scale;
  }
  if (block_max > row.max || block_max != block_max) row.max = block_max;
  row.sum_exp += sum(sum_exp);
  if constexpr (kEntropy) row.sum_zexp += sum(sum_zexp);
}

template <bool kEntropy>
inline void accumulate(VecF z, float max, VecF& sum_exp, VecF& sum_zexp) {
  const VecF d = z - max, e = exp(d);
  sum_exp += e;
  if constexpr (kEntropy) sum_zexp += select(e == 0.f, VecF{}, d * e);
}

template <bool kEntropy, bool kTransform, class T>
void add_columns(RowStats& row, const T* x, int64_t size, Logit<kTransform> logit) {
  constexpr int kPairs = 2, kStep = kPairs * 2 * kLanes;
  for (int64_t start = 0; start < size; start += kSoftmaxBlock) {
    const T* p = x + start;
    const int64_t n = std::min(kSoftmaxBlock, size - start), whole = n / kStep * kStep;
    VecF m[2 * kPairs] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
    float cached[kTransform ? kSoftmaxBlock : 1];  // z of this block: tanh and / only once
    for (int64_t i = 0; i < whole; i += kStep)
      for (int u = 0; u < kPairs; ++u) {
        const int64_t at = i + u * 2 * kLanes;
        VecPair z = load_pair(p + at);
        if constexpr (kTransform) {
          z = {logit(z.first), logit(z.second)};
          store_pair(cached + at, z);
        }
        m[2 * u] = vmax(z.first, m[2 * u]);
        m[2 * u + 1] = vmax(z.second, m[2 * u + 1]);
      }
    for (int64_t i = whole; i < n; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - i);
      const VecF z = logit(load_partial(p + i, count, -kInf));
      if constexpr (kTransform) store_partial(cached + i, count, z);
      m[0] = vmax(z, m[0]);
    }
    const float block_max = max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
    const float top = std::max<float>(block_max, float(row.max));
    if (top == -kInf) continue;  // only excluded columns so far
    VecF s[2 * kPairs] = {}, t[2 * kPairs] = {};
    for (int64_t i = 0; i < whole; i += kStep)
      for (int u = 0; u < kPairs; ++u) {
        const int64_t at = i + u * 2 * kLanes;
        VecPair z;
        if constexpr (kTransform) {
          z = load_pair(cached + at);
        } else {
          z = load_pair(p + at);
        }
        // The next block travels while this one is computed. (A hint: past the end is harmless.)
        for (size_t line = 0; line < 2 * kLanes * sizeof(T); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(p + at + kSoftmaxBlock) + line);
        accumulate<kEntropy>(z.first, top, s[2 * u], t[2 * u]);
        accumulate<kEntropy>(z.second, top, s[2 * u + 1], t[2 * u + 1]);
      }
    for (int64_t i = whole; i < n; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - i);
      VecF z;
      if constexpr (kTransform) {
        z = load_partial(cached + i, count, -kInf);
      } else {
        z = load_partial(p + i, count, -kInf);
      }
      accumulate<kEntropy>(z, top, s[0], t[0]);
    }
    merge_block<kEntropy>(row, top, (s[0] + s[1]) + (s[2] + s[3]), (t[0] + t[1]) + (t[2] + t[3]));
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
