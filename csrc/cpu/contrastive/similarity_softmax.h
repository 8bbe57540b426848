// Softmax statistics of tiles of dot products, by rows and by columns in one reading, and the
// coefficients of their gradient. Sums of a tile are float, go on in double. Everything is in units
// of the dot product: s = scale * d.
#pragma once
#include "contrastive/similarity_tiles.h"

namespace apt::APT_ISA {

// Unit rows whose scale is no larger need no shift, as e^s within e^-32 and e^32 has all its digits
// in a float: one exponential serves the row and the column of a pair.
constexpr double kLargestPlainScale = 32;

template <class A>
bool without_shift(const Similarity& s) {
  return std::is_same_v<A, float> && s.normalize && s.scale > 0 && s.scale <= kLargestPlainScale;
}

// Over the classes of each row (or column): max d, sum e^(scale * (d - shift)), and that sum
// weighted with d - shift. The shift is max d, or 0 where none is needed.
template <class A>
struct Running {
  bool plain;
  double scale;
  std::vector<A> max;
  std::vector<double> sum, weighted;
  Running(const Similarity& s, int64_t rows)
      : plain(without_shift<A>(s)),
        scale(s.scale),
        max(rows, A(-kInf)),
        sum(rows),
        weighted(rows) {}
  // Moves row i to a maximum of at least `tile_max`.
  void raise(int64_t i, A tile_max) {
    if (!(tile_max > max[i])) return;
    if (!plain) {
      const double change = double(max[i]) - tile_max, factor = std::exp(change * scale);
      if (factor > 0) weighted[i] = factor * (weighted[i] + change * sum[i]);
      sum[i] *= factor;
    }
    max[i] = tile_max;
  }
  // Of a row with a class.
  double shift(int64_t i) const { return plain ? 0 : max[i]; }
  double mean(int64_t i) const { return shift(i) + weighted[i] / sum[i]; }
  // The numbers of a row as other processes and backends know them, with the shift max d.
  void read(int64_t i, const double* state) {
    max[i] = A(state[0]);
    const double factor = std::exp(scale * from_shift(i));
    sum[i] = factor * state[1];
    weighted[i] = factor * (state[2] + from_shift(i) * state[1]);
  }
  void write(int64_t i, double* state) const {
    const double factor = std::exp(-scale * from_shift(i));
    state[0] = max[i];
    state[1] = factor * sum[i];
    state[2] = factor * (weighted[i] - from_shift(i) * sum[i]);
  }

 private:
  double from_shift(int64_t i) const { return plain && max[i] != A(-kInf) ? max[i] : 0; }
};

// Maxima of R rows of a tile and of its columns, which are raised.
template <bool kColumns, int R, class A>
void tile_maxima(const A* d, int64_t stride, int64_t width, A* row_max, A* column_max) {
  using V = typename Lanes<A>::V;
  V best[R];
  for (int r = 0; r < R; ++r) best[r] = V{} - A(kInf);
  for (int64_t c = 0; c < width; c += Lanes<A>::kCount) {
    V column;
    for (int r = 0; r < R; ++r) {
      const V x = load(d + r * stride + c);
      best[r] = vmax(x, best[r]);
      column = r == 0 ? x : vmax(x, column);
    }
    if constexpr (kColumns) store(column_max + c, vmax(column, load(column_max + c)));
  }
  for (int r = 0; r < R; ++r) row_max[r] = max(best[r]);
}

// What a tile adds to `sum` (and `weighted`, if kSlope) of its rows and columns.
template <class A>
struct TileSums {
  const A *row_shift, *column_shift;
  A *column_sum, *column_weighted;
  A log2_scale;
};

template <bool kSlope, class V>
void add_exponential(V e, V x, V& sum, V& weighted) {
  sum += e;
  if constexpr (kSlope) weighted += select(e == V{}, V{}, e * x);
}

template <bool kSlope, bool kColumns, bool kPlain, int R, class A>
void tile_sums(const A* d, int64_t stride, int64_t width, int64_t row, const TileSums<A>& t,
               double* row_sum, double* row_weighted) {
  using V = typename Lanes<A>::V;
  V sums[R] = {}, weighted[R] = {};
  for (int64_t c = 0; c < width; c += Lanes<A>::kCount) {
    V column_sum{}, column_weighted{}, shift{};
    if constexpr (kColumns && !kPlain) shift = load(t.column_shift + c);
    for (int r = 0; r < R; ++r) {
      const V x = load(d + r * stride + c);
      if constexpr (kPlain) {
        const V e = exp2(x * t.log2_scale);
        add_exponential<kSlope>(e, x, sums[r], weighted[r]);
        if constexpr (kColumns) add_exponential<kSlope>(e, x, column_sum, column_weighted);
      } else {
        const V below = x - t.row_shift[row + r];
        add_exponential<kSlope>(V(exp2(below * t.log2_scale)), below, sums[r], weighted[r]);
        if constexpr (kColumns)
          add_exponential<kSlope>(V(exp2((x - shift) * t.log2_scale)), V(x - shift), column_sum,
                                  column_weighted);
      }
    }
    if constexpr (kColumns) {
      store(t.column_sum + c, load(t.column_sum + c) + column_sum);
      if constexpr (kSlope)
        store(t.column_weighted + c, load(t.column_weighted + c) + column_weighted);
    }
  }
  for (int r = 0; r < R; ++r) {
    row_sum[r] += sum(sums[r]);
    if constexpr (kSlope) row_weighted[r] += sum(weighted[r]);
  }
}

constexpr int kRowGroup = 4;  // rows that share the loads and stores of the columns
// A column's sum in float is short, as a row's is by its lanes; then it goes on in double.
constexpr int64_t kColumnRows = 32;

// Calls body(std::integral_constant<int, R>, first row) for groups of rows.
template <class Body>
void for_row_groups(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kRowGroup <= rows; r += kRowGroup) body(std::integral_constant<int, kRowGroup>{}, r);
  for (; r < rows; ++r) body(std::integral_constant<int, 1>{}, r);
}

template <bool kSlope, bool kColumns, bool kPlain, class P, class A>
void add_tile(const Tile<A>& t, Worker<P>& w, Running<A>& rows, Running<A>* columns) {
  A *row_shift = w.array(0), *column_shift = w.array(1), *column_sum = w.array(2),
    *column_weighted = w.array(3);
  const int64_t width = round_up(t.columns, Lanes<A>::kCount);
  std::fill_n(column_shift, width, A(-kInf));
  for_row_groups(t.rows, [&](auto group, int64_t r) {
    tile_maxima<kColumns, group()>(t[r], t.stride, width, row_shift + r, column_shift);
  });
  const auto raise = [&](Running<A>& side, int64_t first, int64_t count, A* shift) {
    for (int64_t i = 0; i < count; ++i) {
      side.raise(first + i, shift[i]);
      shift[i] = side.max[first + i] == A(-kInf) ? A(0) : side.max[first + i];
    }
  };
  raise(rows, t.row, t.rows, row_shift);
  if constexpr (kColumns) raise(*columns, t.column, t.columns, column_shift);
  std::fill(column_shift + t.columns, column_shift + width, A(0));
  const TileSums<A> sums{row_shift, column_shift, column_sum, column_weighted,
                         A(rows.scale * kLog2e)};
  for (int64_t begin = 0; begin < t.rows; begin += kColumnRows) {
    std::fill_n(column_sum, width, A(0));
    std::fill_n(column_weighted, width, A(0));
    for_row_groups(std::min(kColumnRows, t.rows - begin), [&](auto group, int64_t r) {
      r += begin;
      tile_sums<kSlope, kColumns, kPlain, group()>(t[r], t.stride, width, r, sums,
                                                   &rows.sum[t.row + r], &rows.weighted[t.row + r]);
    });
    for (int64_t c = 0; kColumns && c < t.columns; ++c) {
      columns->sum[t.column + c] += column_sum[c];
      if constexpr (kSlope) columns->weighted[t.column + c] += column_weighted[c];
    }
  }
}

// Calls body with the flags as std::bool_constant.
template <class Body>
void with_flags(bool a, bool b, bool c, const Body& body) {
  const auto pick = [](bool flag, const auto& next) {
    flag ? next(std::true_type{}) : next(std::false_type{});
  };
  pick(a, [&](auto x) { pick(b, [&](auto y) { pick(c, [&](auto z) { body(x, y, z); }); }); });
}

// Calls add_tile for its flags. columns: null for none, and ignored on the diagonal of a triangle.
template <class P, class A>
void add_tile(const Tile<A>& t, Worker<P>& w, bool slopes, Running<A>& rows, Running<A>* columns) {
  with_flags(slopes, columns != nullptr && !t.diagonal, rows.plain,
             [&](auto slope, auto both, auto plain) {
               add_tile<slope(), both(), plain()>(t, w, rows, columns);
             });
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// log2 of p = e^(scale * x - lse), rounded once where products and sums are fused: scale and lse
// have two parts. Elsewhere the difference comes first, in units of x, as the product would lose
// digits.
template <class A>
class LogShare {
 public:
  explicit LogShare(double scale)
      : scale_(scale), high_(A(scale * kLog2e)), low_(A(scale * kLog2e - high_)) {}
  // The lse of a row as operator() wants it.
  struct Lse {
    A high, low;
  };
  Lse lse(double lse) const {
    const double shift = kFused ? lse * kLog2e : lse / scale_;
    return {A(shift), A(shift - A(shift))};
  }
  template <class V, class L>
  V operator()(V x, L lse_high, L lse_low) const {
    if constexpr (kFused) {
      return (x * high_ - lse_high) + (x * low_ - lse_low);
    } else {
      return ((x - lse_high) - lse_low) * high_;
    }
  }

 private:
  double scale_;
  A high_, low_;
};

// The softmaxes of all rows (or columns) on their way back. Arrays end a vector after the last row.
template <class A>
class SoftmaxWeights {
 public:
  // weights: upstream gradients, null for none. stats: (lse in units of d, unused) of a row.
  SoftmaxWeights(const Similarity& s, const A* weights, const double* stats, int64_t rows)
      : weight(weights ? rows + Lanes<A>::kCount : 0),
        scaled(weight.size()),
        lse_high(weight.size()),
        lse_low(weight.size()) {
    const LogShare<A> log_share(s.scale);
    for (int64_t i = 0; weights && i < rows; ++i) {
      // Without a weight nothing may overflow: such a row may have no lse.
      const double lse = weights[i] == 0 ? kInf : s.scale * stats[2 * i];
      const typename LogShare<A>::Lse parts = log_share.lse(lse);
      weight[i] = weights[i];
      scaled[i] = A(weights[i] * std::exp(-lse));
      lse_high[i] = parts.high;
      lse_low[i] = lse == kInf ? A(0) : parts.low;
      plain = plain &&
              (weight[i] == 0 || (std::abs(scaled[i]) > A(1e-25) && std::abs(scaled[i]) < A(1e20)));
    }
  }
  explicit operator bool() const { return !weight.empty(); }

  std::vector<A> weight, scaled;  // scaled: weight * e^-lse
  std::vector<A> lse_high, lse_low;
  bool plain = true;  // products of `scaled` with e^s have all their digits
};

// d becomes the coefficient w_i p_ij + w_j p_ji of the pair. (Not so in the padding.)
template <bool kRows, bool kColumns, bool kPlain, class A>
void softmax_coefficients(const Tile<A>& t, double scale, const SoftmaxWeights<A>& rows,
                          const SoftmaxWeights<A>& columns) {
  using V = typename Lanes<A>::V;
  const LogShare<A> log_share(scale);
  const A log2_scale = A(scale * kLog2e);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < t.columns; c += Lanes<A>::kCount) {
      const int64_t i = t.row + r, j = t.column + c;
      const V d = load(t[r] + c);
      V coefficient{};
      if constexpr (kPlain) {
        if constexpr (kRows) coefficient += rows.scaled[i];
        if constexpr (kColumns) coefficient += load(columns.scaled.data() + j);
        coefficient = coefficient * exp2(d * log2_scale);
      } else {
        if constexpr (kRows)
          coefficient = rows.weight[i] * exp2(log_share(d, rows.lse_high[i], rows.lse_low[i]));
        if constexpr (kColumns)
          coefficient +=
              load(columns.weight.data() + j) * exp2(log_share(d, load(columns.lse_high.data() + j),
                                                               load(columns.lse_low.data() + j)));
      }
      store(t[r] + c, coefficient);
    }
}

// Calls softmax_coefficients for its flags.
template <class A>
void softmax_coefficients(const Similarity& s, const Tile<A>& t, const SoftmaxWeights<A>& rows,
                          const SoftmaxWeights<A>& columns) {
  const bool plain = without_shift<A>(s) && rows.plain && columns.plain;
  with_flags(bool(rows), bool(columns), plain, [&](auto r, auto c, auto without) {
    softmax_coefficients<r(), c(), without()>(t, s.scale, rows, columns);
  });
}

}  // namespace apt::APT_ISA
