// InfoNCE and NT-Xent (van den Oord 2018, Chen 2020) without the matrix of similarities.
// Passes: forward one product a tile, backward one more and one for each side's gradient: 2 N M D
// flops each; a triangle (NT-Xent, N rows) computes only the tiles i <= j, N^2 D and 3 N^2 D flops.
// Bytes: 2 N M s / 256 rows read (s = element size). Parallel over tiles that share no block.
// Accuracy: positives apart from the other classes, so that a loss near 0 keeps its digits.
#include "contrastive/info_nce.h"

#include "contrastive/similarity_softmax.h"
#include "contrastive/similarity_tiles.h"

namespace apt::APT_ISA {
namespace {

// The softmax of rows (or columns): the positives, which stay out of the sums, and the others.
template <class A>
struct Side {
  Running<A> others;
  std::vector<A> positive;
  Side(const Similarity& s, int64_t rows) : others(s, rows), positive(rows) {}

  static constexpr int64_t kState = 4;  // of a row: see InfoNCE::before
  void read(const double* state) {
    for (size_t i = 0; i < positive.size(); ++i, state += kState) {
      others.read(i, state);
      positive[i] = A(state[3]);
    }
  }
  void write(double* state) const {
    for (size_t i = 0; i < positive.size(); ++i, state += kState) {
      others.write(i, state);
      state[3] = positive[i];
    }
  }

  struct Result {
    double loss, right, slope, lse, rest;
  };
  Result result(int64_t i, double scale) const {
    const double positive_d = positive[i];
    const bool alone = others.sum[i] == 0;  // no other class; maxima do not see NaN, sums do
    if (alone && std::abs(positive_d) < kInf) return {0, 1, 0, positive_d, 0};
    const double gap = alone || !(positive_d < kInf)
                           ? std::numeric_limits<double>::quiet_NaN()
                           : scale * (others.shift(i) - positive_d) + std::log(others.sum[i]);
    const double loss = (gap > 0 ? gap : 0) + std::log1p(std::exp(-std::abs(gap)));
    const double rest = gap != gap ? gap : 1 / (1 + std::exp(-gap));
    const double slope = rest * (others.mean(i) - positive_d);
    const bool right = positive[i] > others.max[i] && gap == gap;
    return {loss, double(right), slope, positive_d + loss / scale, rest};
  }
};

// Calls body(i, j, element) for the positives in a tile: they belong to row i and, where columns
// have a softmax, to column j.
template <class A, class Body>
void for_positives(const Similarity& s, const Tile<A>& tile, const Body& body) {
  tile.along(s.label_offset, body);
  if (tile.diagonal) tile.along(-s.label_offset, body);  // both views are rows of this tile
}

// Calls body(i, query, key) with the unit rows i of the query and of the positives of their own.
template <class A, class Body>
void for_own_positives(const InfoNCE& a, const A* row_inverse, const Body& body) {
  const int64_t width = a.own.width;
  Workspace<A> own_inverse(a.own.count);
  inverse_norms(a.own, a.similarity.normalize, own_inverse.data());
  parallel_for(a.own.count, kRowGrain, [&](int64_t begin, int64_t end) {
    Workspace<A> query(width), key(width);
    for (int64_t i = begin; i < end; ++i) {
      load_rows(a.similarity.rows, i, 1, row_inverse, query.data());
      load_rows(a.own, i, 1, own_inverse.data(), key.data());
      body(i, query.data(), key.data());
    }
  });
}

template <class A>
void write_results(const InfoNCE& a, const Side<A>& rows, const Side<A>* columns) {
  for (int64_t i = 0; i < a.similarity.rows.count; ++i) {
    typename Side<A>::Result r = rows.result(i, a.similarity.scale);
    a.row_stats[2 * i] = r.lse;
    a.row_stats[2 * i + 1] = r.rest;
    if (columns) {
      const typename Side<A>::Result c = columns->result(i, a.similarity.scale);
      a.column_stats[2 * i] = c.lse;
      a.column_stats[2 * i + 1] = c.rest;
      r = {(r.loss + c.loss) / 2, (r.right + c.right) / 2, (r.slope + c.slope) / 2, 0, 0};
    }
    static_cast<A*>(a.losses)[i] = A(r.loss);
    static_cast<A*>(a.right)[i] = A(r.right);
    if (a.need_slopes) a.slopes[i] = r.slope;
  }
}

template <class P>
void forward(const InfoNCE& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  const Norms<A> norms(s);
  Side<A> rows(s, s.rows.count), other(s, a.symmetric ? s.columns.count : 0);
  Side<A>* columns = s.triangle ? &rows : a.symmetric ? &other : nullptr;
  const int64_t behind_rows = s.rows.count * Side<A>::kState;
  if (a.before) {
    rows.read(a.before);
    other.read(a.before + behind_rows);
  }
  for_each_product<P>(s, norms, false, [&](const Tile<A>& tile, Worker<P>& w) {
    tile.along(s.self_offset, [](int64_t, int64_t, A& d) { d = -kInf; });
    for_positives(s, tile, [&](int64_t i, int64_t j, A& d) {
      rows.positive[i] = d;
      if (columns) columns->positive[j] = d;
      d = -kInf;
    });
    add_tile(tile, w, a.need_slopes, rows.others, columns ? &columns->others : nullptr);
  });
  for_own_positives(a, norms.rows(), [&](int64_t i, const A* query, const A* key) {
    rows.positive[i] = A(dot(query, key, a.own.width));
  });
  if (a.after) {
    rows.write(a.after);
    other.write(a.after + behind_rows);
  }
  write_results(a, rows, a.symmetric && !a.after ? &other : nullptr);
}

// d of a tile becomes the coefficients of the gradient.
template <class A>
void coefficients(const Similarity& s, const Tile<A>& tile, const SoftmaxWeights<A>& rows,
                  const SoftmaxWeights<A>& columns) {
  softmax_coefficients(s, tile, rows, columns);
  tile.along(s.self_offset, [](int64_t, int64_t, A& coefficient) { coefficient = 0; });
  for_positives(s, tile, [](int64_t, int64_t, A& coefficient) { coefficient = 0; });
}

template <class P>
void backward(const InfoNCE& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  const Norms<A> norms(s);
  Gradient<A> grad_rows(s.rows, a.grad_rows, s.unrounded);
  Gradient<A> grad_columns(s.columns, a.grad_columns, s.unrounded);
  Gradient<A> grad_own(a.own, a.grad_own, s.unrounded);
  const A* row_weights = static_cast<const A*>(a.grad_losses);
  const A* column_weights = s.triangle ? row_weights : static_cast<const A*>(a.grad_column_losses);
  const double* column_stats = s.triangle ? a.row_stats : a.column_stats;
  const SoftmaxWeights<A> row_side(s, row_weights, a.row_stats, s.rows.count);
  const SoftmaxWeights<A> column_side(s, s.triangle ? nullptr : column_weights, column_stats,
                                      s.columns.count);
  if (grad_rows || grad_columns) {
    for_each_product<P>(s, norms, true, [&](const Tile<A>& tile, Worker<P>& w) {
      coefficients(s, tile, row_side, s.triangle ? row_side : column_side);
      if (grad_rows) P::add_to_left(grad_rows.row(tile.row), tile, w.right, w.scratch, true);
      if (s.triangle && !tile.diagonal)
        P::add_to_right(grad_rows.row(tile.column), tile, w.left, w.scratch, true);
      if (grad_columns)
        P::add_to_right(grad_columns.row(tile.column), tile, w.left, w.scratch, true);
    });
  }
  // w (p - 1), without the cancellation
  add_pairs(s.rows, norms.rows(), grad_rows, s.columns, norms.columns(),
            s.triangle ? grad_rows : grad_columns, s.label_offset, [&](int64_t i) {
              const int64_t j = i + s.label_offset;
              double sum = 0;
              if (row_weights) sum -= row_weights[i] * a.row_stats[2 * i + 1];
              if (column_weights) sum -= column_weights[j] * column_stats[2 * j + 1];
              return A(sum);
            });
  Workspace<A> own_inverse(a.own.count);
  if (a.own.count > 0) {
    inverse_norms(a.own, s.normalize, own_inverse.data());
    add_pairs(s.rows, norms.rows(), grad_rows, a.own, own_inverse.data(), grad_own, 0,
              [&](int64_t i) { return A(-row_weights[i] * a.row_stats[2 * i + 1]); });
  }
  grad_rows.finish(norms.rows(), s.normalize, s.scale);
  grad_columns.finish(norms.columns(), s.normalize, s.scale);
  grad_own.finish(own_inverse.data(), s.normalize, s.scale);
}

}  // namespace

void info_nce_fwd(const InfoNCE& a) {
  with_products(a.similarity, [&](auto products) { forward<decltype(products)>(a); });
}

void info_nce_bwd(const InfoNCE& a) {
  with_products(a.similarity, [&](auto products) { backward<decltype(products)>(a); });
}

}  // namespace apt::APT_ISA
