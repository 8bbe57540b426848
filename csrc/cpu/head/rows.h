// Rows of a tile of logits: their softmax statistics, and their gradient written over them.
// Over softmax_row.h for float, plain loops for double.
#pragma once
#include "common/softmax_row.h"

namespace apt::APT_ISA {

// dz_v = -p_v (grad + grad_entropy (log p_v + entropy)) + uniform, and + pick at the token.
struct RowTerms {
  int64_t token;
  double temperature, lse, grad, pick, uniform, grad_entropy, entropy;
};

inline void merge(RowStats& row, const RowStats& other) {
  if (other.shift == -kInf) return;
  if (row.shift == -kInf) {
    row = other;
    return;
  }
  RowStats from = other;
  if (from.shift > row.shift) std::swap(row, from);
  const double change = from.shift - row.shift, scale = std::exp(change);
  row.sum_exp += scale * from.sum_exp;
  row.sum_zexp += scale * (from.sum_zexp + change * from.sum_exp);
}

// Functions of one row of `size` logits, chosen once a call. `picked` is the column of the row's
// token in this tile, or -1.
template <class A>
struct RowFunctions {
  void (*add)(RowStats& row, const A* x, int64_t size, double temperature, double softcap);
  double (*sum)(const A* x, int64_t size, double softcap);  // of z
  A (*largest)(const A* x, int64_t size);
  void (*write_gradient)(A* x, int64_t size, const RowTerms& row, double softcap, int64_t picked);
  double (*logit)(A x, double temperature, double softcap);  // z
  double (*slope)(A x, double temperature, double softcap);  // dz/dx
};

template <bool kEntropy, bool kTransform>
void add_row(RowStats& row, const float* x, int64_t size, double temperature, double softcap) {
  add_columns<kEntropy>(row, x, size, Logit<kTransform>{float(temperature), float(softcap)});
}

template <bool kTransform>
double sum_row(const float* x, int64_t size, double softcap) {
  const Logit<kTransform> logit{1.f, float(softcap)};
  VecF total{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += logit(load(x + i));
  double rest = 0;
  for (; i < size; ++i) rest += logit(x[i]);
  return rest + apt::APT_ISA::sum(total);
}

inline float largest_of_row(const float* x, int64_t size) {
  VecF best = splat(-kInf);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) best = vmax(load(x + i), best);
  if (i < size) best = vmax(load_partial(x + i, size - i, -kInf), best);
  return max(best);
}

template <bool kEntropy, bool kTransform>
void write_row(float* x, int64_t size, const RowTerms& row, double softcap, int64_t picked) {
  const float lse_high = float(row.lse), uniform = float(row.uniform);
  const RowGradient<kEntropy, kTransform> softmax{{float(row.temperature), float(softcap)},
                                                  lse_high,
                                                  float(row.lse - lse_high),
                                                  float(row.grad),
                                                  float(row.grad_entropy),
                                                  float(row.entropy)};
  const auto gradient = [&](VecF v, float constant) {
    return (constant - softmax.softmax_term(v)) * softmax.logit.slope(v);
  };
  const float token = picked >= 0 ? gradient(splat(x[picked]), uniform + float(row.pick))[0] : 0.f;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, gradient(load(x + i), uniform));
  if (i < size)
    store_partial(x + i, size - i, gradient(load_partial(x + i, size - i, -kInf), uniform));
  if (picked >= 0) x[picked] = token;
}

template <bool kTransform>
double logit_of(float x, double temperature, double softcap) {
  return Logit<kTransform>{float(temperature), float(softcap)}(x);
}

template <bool kTransform>
double slope_of(float x, double temperature, double softcap) {
  return Logit<kTransform>{float(temperature), float(softcap)}.slope(splat(x))[0];
}

// float64: for checking rather than for speed.
inline double double_logit(double x, double temperature, double softcap) {
  if (softcap > 0 && x != -kInf) x = softcap * std::tanh(x / softcap);
  return x / temperature;
}

inline double double_slope(double x, double temperature, double softcap) {
  const double t = softcap > 0 && x != -kInf ? std::tanh(x / softcap) : 0;
  return (1 - t * t) / temperature;
}

inline void add_row_double(RowStats& row, const double* x, int64_t size, double temperature,
                           double softcap) {
  RowStats tile = empty_row();
  for (int64_t i = 0; i < size; ++i) {
    const double z = double_logit(x[i], temperature, softcap);
    if (z > tile.shift || z != z) tile.shift = z;
  }
  if (tile.shift == -kInf) return;
  long double sum_exp = 0, sum_zexp = 0;  // a loss near 0 is the logarithm of a sum near 1
  for (int64_t i = 0; i < size; ++i) {
    const double d = double_logit(x[i], temperature, softcap) - tile.shift, e = std::exp(d);
    sum_exp += e;
    sum_zexp += e == 0 ? 0 : d * e;
  }
  tile.sum_exp = double(sum_exp);
  tile.sum_zexp = double(sum_zexp);
  merge(row, tile);
}

inline double sum_row_double(const double* x, int64_t size, double softcap) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += double_logit(x[i], 1, softcap);
  return total;
}

inline double largest_of_row_double(const double* x, int64_t size) {
  double best = -kInf;
  for (int64_t i = 0; i < size; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

inline void write_row_double(double* x, int64_t size, const RowTerms& row, double softcap,
                             int64_t picked) {
  for (int64_t i = 0; i < size; ++i) {
    const double log_p = double_logit(x[i], row.temperature, softcap) - row.lse;
    const double p = std::exp(log_p), e = p == 0 ? 0 : row.grad_entropy * (log_p + row.entropy);
    const double constant = i == picked ? row.uniform + row.pick : row.uniform;
    x[i] = (constant - p * (row.grad + e)) * double_slope(x[i], row.temperature, softcap);
  }
}

template <bool kEntropy, bool kTransform>
RowFunctions<float> float_functions() {
  return {add_row<kEntropy, kTransform>,   sum_row<kTransform>,  largest_of_row,
          write_row<kEntropy, kTransform>, logit_of<kTransform>, slope_of<kTransform>};
}

template <class A>
RowFunctions<A> row_functions(bool entropy, bool transform) {
  if constexpr (std::is_same_v<A, double>) {
    return {add_row_double,   sum_row_double, largest_of_row_double,
            write_row_double, double_logit,   double_slope};
  } else if (transform) {
    return entropy ? float_functions<true, true>() : float_functions<false, true>();
  } else {
    return entropy ? float_functions<true, false>() : float_functions<false, false>();
  }
}

}  // namespace apt::APT_ISA
