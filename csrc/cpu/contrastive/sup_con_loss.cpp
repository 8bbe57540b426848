// Supervised contrastive loss (Khosla 2020, L_out) without the matrix of similarities.
// Passes: forward one product a tile, backward one more and one for each side's gradient. All rows
// with all rows, N of them, are a triangle of tiles: N^2 D flops forward, 3 N^2 D backward.
// Bytes: N^2 s / 512 rows read (s = element size). Parallel over tiles that share no block.
// Accuracy: sums of a tile in float, then in double.
#include "contrastive/sup_con_loss.h"

#include <unordered_map>

#include "contrastive/similarity_softmax.h"
#include "contrastive/similarity_tiles.h"

namespace apt::APT_ISA {
namespace {

// Labels as small integers, which a float holds exactly, and how often each occurs in a column.
template <class A>
struct Labels {
  std::vector<A> rows, columns;
  std::vector<int64_t> counts;
  explicit Labels(const SupCon& a) {
    std::unordered_map<int64_t, int64_t> ids;
    const auto id = [&](int64_t label) {
      return A(ids.try_emplace(label, ids.size()).first->second);
    };
    for (int64_t i = 0; i < a.similarity.rows.count; ++i) rows.push_back(id(a.labels[i]));
    if (a.similarity.triangle) columns = rows;
    for (int64_t j = columns.size(); j < a.similarity.columns.count; ++j)
      columns.push_back(id(a.column_labels[j]));
    counts.resize(ids.size());
    for (const A column : columns) ++counts[int64_t(column)];
  }
};

template <class A>
struct Positives {
  std::vector<A> best, best_negative;
  std::vector<double> sum;
  std::vector<int64_t> number;
  explicit Positives(int64_t rows)
      : best(rows, A(-kInf)), best_negative(rows, A(-kInf)), sum(rows), number(rows) {}
  void add(int64_t i, A positive, A negative, double total) {
    best[i] = std::max(best[i], positive);
    best_negative[i] = std::max(best_negative[i], negative);
    sum[i] += total;
  }
};

template <bool kColumns, class A>
void add_positives(const Tile<A>& t, const A* row_labels, const A* column_labels, A* arrays,
                   int64_t length, Positives<A>& rows) {
  using V = typename Lanes<A>::V;
  A *best = arrays, *best_negative = arrays + length, *sums = arrays + 2 * length;
  const V excluded = V{} - A(kInf);
  std::fill_n(best, 2 * length, A(-kInf));
  std::fill_n(sums, length, A(0));
  for (int64_t r = 0; r < t.rows; ++r) {
    V row_best = excluded, row_negative = excluded, row_sum{};
    for (int64_t c = 0; c < t.columns; c += Lanes<A>::kCount) {
      const V d = load(t[r] + c);
      const auto same = load(column_labels + c) == row_labels[r];
      const V positive = select(same, d, excluded), negative = select(same, excluded, d);
      const V counted = select(positive == excluded, V{}, positive);  // not itself
      row_best = vmax(positive, row_best);
      row_negative = vmax(negative, row_negative);
      row_sum += counted;
      if constexpr (kColumns) {
        store(best + c, vmax(positive, load(best + c)));
        store(best_negative + c, vmax(negative, load(best_negative + c)));
        store(sums + c, load(sums + c) + counted);
      }
    }
    rows.add(t.row + r, max(row_best), max(row_negative), sum(row_sum));
  }
  for (int64_t c = 0; kColumns && c < t.columns; ++c)
    rows.add(t.column + c, best[c], best_negative[c], sums[c]);
}

// The labels of a tile's columns, to a whole vector; the padding has a label of nobody.
template <class P, class A>
const A* padded_labels(const std::vector<A>& labels, const Tile<A>& t, Worker<P>& w) {
  A* padded = w.array(Worker<P>::kArrays - 1);
  std::fill_n(padded, w.stride, A(-1));
  std::copy_n(labels.data() + t.column, t.columns, padded);
  return padded;
}

constexpr int64_t kState = 7;  // of a row: see SupCon::before

template <class A>
void read_state(const double* state, Running<A>& all, Positives<A>& positives) {
  for (size_t i = 0; i < all.max.size(); ++i, state += kState) {
    all.read(i, state);
    positives.best[i] = A(state[3]), positives.best_negative[i] = A(state[4]);
    positives.sum[i] = state[5], positives.number[i] = int64_t(state[6]);
  }
}

template <class A>
void write_state(double* state, const Running<A>& all, const Positives<A>& positives) {
  for (size_t i = 0; i < all.max.size(); ++i, state += kState) {
    all.write(i, state);
    state[3] = positives.best[i], state[4] = positives.best_negative[i];
    state[5] = positives.sum[i], state[6] = double(positives.number[i]);
  }
}

template <class A>
void write_results(const SupCon& a, const Running<A>& all, const Positives<A>& positives) {
  const Similarity& s = a.similarity;
  for (int64_t i = 0; i < s.rows.count; ++i) {
    const int64_t count = positives.number[i];
    const double mean = positives.sum[i] / count, log_sum = std::log(all.sum[i]);
    a.stats[2 * i] = count ? all.shift(i) + log_sum / s.scale : 0;
    a.stats[2 * i + 1] = count ? 1. / count : 0;
    const A loss = count ? A(s.scale * (all.shift(i) - mean) + log_sum) : A(0);
    static_cast<A*>(a.losses)[i] = loss;
    // maxima do not see NaN
    static_cast<A*>(a.right)[i] =
        count && positives.best[i] > positives.best_negative[i] && loss == loss;
    if (a.need_slopes) a.slopes[i] = count ? all.mean(i) - mean : 0;
  }
}

template <class P>
void forward(const SupCon& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  const Labels<A> labels(a);
  Running<A> all(s, s.rows.count);
  Positives<A> positives(s.rows.count);
  if (a.before) read_state(a.before, all, positives);
  for (int64_t i = 0; i < s.rows.count; ++i) {
    const int64_t itself = i + s.self_offset;
    positives.number[i] +=
        labels.counts[int64_t(labels.rows[i])] - (itself >= 0 && itself < s.columns.count);
  }
  for_each_product<P>(s, Norms<A>(s), false, [&](const Tile<A>& tile, Worker<P>& w) {
    tile.along(s.self_offset, [](int64_t, int64_t, A& d) { d = -kInf; });
    const bool both = s.triangle && !tile.diagonal;
    const auto add = both ? add_positives<true, A> : add_positives<false, A>;
    add(tile, labels.rows.data() + tile.row, padded_labels(labels.columns, tile, w), w.array(0),
        w.length, positives);
    add_tile(tile, w, a.need_slopes, all, s.triangle ? &all : nullptr);
  });
  if (a.after) write_state(a.after, all, positives);
  write_results(a, all, positives);
}

// Upstream gradients of the losses of rows that have a positive (0 else), and their share in each.
template <class A>
struct Weights {
  std::vector<A> whole, share;
  SoftmaxWeights<A> softmax;
  Weights(const Similarity& s, const void* grad_losses, const double* stats, int64_t rows)
      : whole(weights(grad_losses, stats, rows)),
        share(rows),
        softmax(s, whole.data(), stats, rows) {
    for (int64_t i = 0; i < rows; ++i) share[i] = A(whole[i] * stats[2 * i + 1]);
  }

 private:
  static std::vector<A> weights(const void* grad_losses, const double* stats, int64_t rows) {
    std::vector<A> found(rows);
    for (int64_t i = 0; i < rows; ++i)
      found[i] = stats[2 * i + 1] > 0 ? static_cast<const A*>(grad_losses)[i] : A(0);
    return found;
  }
};

// d of a tile becomes the coefficients of the gradient.
template <class P, class A>
void coefficients(const SupCon& a, const Tile<A>& t, Worker<P>& w, const Labels<A>& labels,
                  const Weights<A>& rows, const Weights<A>& columns) {
  using V = typename Lanes<A>::V;
  softmax_coefficients(a.similarity, t, rows.softmax, columns.softmax);
  const A* column_labels = padded_labels(labels.columns, t, w);
  A* shares = w.array(6);
  std::fill_n(shares, w.stride, A(0));
  std::copy_n(columns.share.data() + t.column, t.columns, shares);
  for (int64_t r = 0; r < t.rows; ++r) {
    const A label = labels.rows[t.row + r], share = rows.share[t.row + r];
    for (int64_t c = 0; c < t.columns; c += Lanes<A>::kCount) {
      const auto same = load(column_labels + c) == label;
      const V coefficient = load(t[r] + c), positive = coefficient - (share + load(shares + c));
      store(t[r] + c, select(same, positive, coefficient));
    }
  }
  t.along(a.similarity.self_offset, [](int64_t, int64_t, A& coefficient) { coefficient = 0; });
}

template <class P>
void backward(const SupCon& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  const Norms<A> norms(s);
  const Labels<A> labels(a);
  const Weights<A> rows(s, a.grad_losses, a.stats, s.rows.count);
  const Weights<A> other(s, a.grad_column_losses, a.column_stats, s.triangle ? 0 : s.columns.count);
  Gradient<A> grad_rows(s.rows, a.grad_rows, s.unrounded);
  for_each_product<P>(s, norms, true, [&](const Tile<A>& tile, Worker<P>& w) {
    coefficients(a, tile, w, labels, rows, s.triangle ? rows : other);
    P::add_to_left(grad_rows.row(tile.row), tile, w.right, w.scratch, true);
    if (s.triangle && !tile.diagonal)
      P::add_to_right(grad_rows.row(tile.column), tile, w.left, w.scratch, true);
  });
  grad_rows.finish(norms.rows(), s.normalize, s.scale);
}

}  // namespace

void sup_con_loss_fwd(const SupCon& a) {
  with_products(a.similarity, [&](auto products) { forward<decltype(products)>(a); });
}

void sup_con_loss_bwd(const SupCon& a) {
  with_products(a.similarity, [&](auto products) { backward<decltype(products)>(a); });
}

}  // namespace apt::APT_ISA
