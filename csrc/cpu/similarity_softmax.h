// Softmax statistics of tiles of dot products, by rows and by columns in one reading, and the
// coefficients of their gradient. Maxima are the real ones; sums of a tile are float, go on in
// double. Everything is in units of the dot product: s = scale * d.
#pragma once
#include "similarity_tiles.h"

namespace apt::APT_ISA {

// Over the classes of each row (or column): max d, sum e^(s - max s), and that sum weighted with
// d - max d.
template <class A>
struct Running {
  std::vector<A> max;
  std::vector<double> sum, weighted;
  explicit Running(int64_t rows) : max(rows, A(-kInf)), sum(rows), weighted(rows) {}
  // Moves row i to a maximum of at least `tile_max`.
  void raise(int64_t i, A tile_max, double scale) {
    if (tile_max > max[i]) {
      const double shift = double(max[i]) - tile_max, factor = std::exp(shift * scale);
      if (factor > 0) weighted[i] = factor * (weighted[i] + shift * sum[i]);
      sum[i] *= factor;
      max[i] = tile_max;
    }
  }
  A shift(int64_t i) const { return max[i] == A(-kInf) ? A(0) : max[i]; }
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
  A scale;
};

template <bool kSlope, class V, class A>
void add_exponential(V x, A scale, V& sum, V& weighted) {
  const V e = exp(x * scale);
  sum += e;
  if constexpr (kSlope) weighted += select(e == A(0), V{}, e * x);
}

template <bool kSlope, bool kColumns, int R, class A>
void tile_sums(const A* d, int64_t stride, int64_t width, int64_t row, const TileSums<A>& t,
               double* row_sum, double* row_weighted) {
  using V = typename Lanes<A>::V;
  V sums[R] = {}, weighted[R] = {};
  for (int64_t c = 0; c < width; c += Lanes<A>::kCount) {
    V column_sum{}, column_weighted{}, shift{};
    if constexpr (kColumns) shift = load(t.column_shift + c);
    for (int r = 0; r < R; ++r) {
      const V x = load(d + r * stride + c);
      add_exponential<kSlope>(x - t.row_shift[row + r], t.scale, sums[r], weighted[r]);
      if constexpr (kColumns)
        add_exponential<kSlope>(x - shift, t.scale, column_sum, column_weighted);
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

template <bool kSlope, bool kColumns, class P, class A>
void add_tile(const Tile<A>& t, Worker<P>& w, double scale, Running<A>& rows, Running<A>* columns) {
  A *row_shift = w.array(0), *column_shift = w.array(1), *column_sum = w.array(2),
    *column_weighted = w.array(3);
  const int64_t width = round_up(t.columns, Lanes<A>::kCount);
  std::fill_n(column_shift, width, A(-kInf));
  for_row_groups(t.rows, [&](auto group, int64_t r) {
    tile_maxima<kColumns, group()>(t[r], t.stride, width, row_shift + r, column_shift);
  });
  for (int64_t r = 0; r < t.rows; ++r) {
    rows.raise(t.row + r, row_shift[r], scale);
    row_shift[r] = rows.shift(t.row + r);
  }
  for (int64_t c = 0; kColumns && c < t.columns; ++c) {
    columns->raise(t.column + c, column_shift[c], scale);
    column_shift[c] = columns->shift(t.column + c);
  }
  std::fill(column_shift + t.columns, column_shift + width, A(0));
  const TileSums<A> sums{row_shift, column_shift, column_sum, column_weighted, A(scale)};
  for (int64_t begin = 0; begin < t.rows; begin += kColumnRows) {
    std::fill_n(column_sum, width, A(0));
    std::fill_n(column_weighted, width, A(0));
    for_row_groups(std::min(kColumnRows, t.rows - begin), [&](auto group, int64_t r) {
      r += begin;
      tile_sums<kSlope, kColumns, group()>(t[r], t.stride, width, r, sums, &rows.sum[t.row + r],
                                           &rows.weighted[t.row + r]);
    });
    for (int64_t c = 0; kColumns && c < t.columns; ++c) {
      columns->sum[t.column + c] += column_sum[c];
      if constexpr (kSlope) columns->weighted[t.column + c] += column_weighted[c];
    }
  }
}

// Calls add_tile for its flags. columns: null for none, and ignored on the diagonal of a triangle.
template <class P, class A>
void add_tile(const Tile<A>& t, Worker<P>& w, double scale, bool slopes, Running<A>& rows,
              Running<A>* columns) {
  if (t.diagonal || columns == nullptr) {
    slopes ? add_tile<true, false>(t, w, scale, rows, columns)
           : add_tile<false, false>(t, w, scale, rows, columns);
  } else {
    slopes ? add_tile<true, true>(t, w, scale, rows, columns)
           : add_tile<false, true>(t, w, scale, rows, columns);
  }
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// scale * d - lse = log p, rounded once where products and sums are fused: scale and lse have two
// parts. Elsewhere the difference comes first, in units of d, as the product would lose digits.
template <class A>
struct LogShare {
  A scale_high, scale_low;
  explicit LogShare(double scale) : scale_high(A(scale)), scale_low(A(scale - scale_high)) {}
  template <class V, class L>
  V operator()(V d, L lse_high, L lse_low) const {
    if constexpr (kFused) {
      return (d * scale_high - lse_high) + (d * scale_low - lse_low);
    } else {
      return ((d - lse_high) - lse_low) * scale_high;
    }
  }
};

// One side of a tile: upstream gradients, and the log-sum-exps in two parts as LogShare wants them.
template <class A>
struct SoftmaxSide {
  A *weight, *lse_high, *lse_low;
  // Reads `count` rows from `first` on; weight 0 to a whole vector beyond them.
  void read(const A* weights, const double* stats, double scale, int64_t first,
            int64_t count) const {
    for (int64_t i = 0; i < round_up(count, Lanes<A>::kCount); ++i) {
      const double lse = i < count ? stats[2 * (first + i)] * (kFused ? scale : 1) : 0;
      weight[i] = i < count ? weights[first + i] : A(0);
      lse_high[i] = A(lse);
      lse_low[i] = A(lse - lse_high[i]);
    }
  }
};

// d becomes the coefficient w_i p_ij + w_j p_ji of the pair. (Not so in the padding.)
template <bool kRows, bool kColumns, class A>
void softmax_coefficients(const Tile<A>& t, double scale, SoftmaxSide<A> rows,
                          SoftmaxSide<A> columns) {
  using V = typename Lanes<A>::V;
  const LogShare<A> log_share(scale);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < t.columns; c += Lanes<A>::kCount) {
      const V d = load(t[r] + c);
      V coefficient{};
      if constexpr (kRows)
        coefficient = rows.weight[r] * exp(log_share(d, rows.lse_high[r], rows.lse_low[r]));
      if constexpr (kColumns)
        coefficient += load(columns.weight + c) *
                       exp(log_share(d, load(columns.lse_high + c), load(columns.lse_low + c)));
      store(t[r] + c, coefficient);
    }
}

}  // namespace apt::APT_ISA
