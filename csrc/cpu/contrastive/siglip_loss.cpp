// SigLIP's sigmoid loss of all pairs (Zhai 2023) without the matrix of similarities.
// Passes: forward one product a tile, backward one more and one for each side's gradient: 2 N M D
// flops each. Bytes: 2 N M s / 512 rows read (s = element size). Parallel over tiles that share no
// block. Accuracy: log(1 + e^x) to a few ulp also where e^x is small; sums of a tile in float, then
// in double.
#include "contrastive/siglip_loss.h"

#include "contrastive/similarity_tiles.h"

namespace apt::APT_ISA {
namespace {

template <class A>
struct RowSums {
  std::vector<A> best, positive;  // the largest d but the positive's; the positive's
  std::vector<double> loss, slope, bias_slope;
  explicit RowSums(int64_t rows)
      : best(rows, A(-kInf)), positive(rows), loss(rows), slope(rows), bias_slope(rows) {}

  static constexpr int64_t kState = 5;  // of a row: see SigLIP::before
  void read(const double* state) {
    for (size_t i = 0; i < best.size(); ++i, state += kState) {
      best[i] = A(state[0]), positive[i] = A(state[1]);
      loss[i] = state[2], slope[i] = state[3], bias_slope[i] = state[4];
    }
  }
  void write(double* state) const {
    for (size_t i = 0; i < best.size(); ++i, state += kState) {
      state[0] = best[i], state[1] = positive[i];
      state[2] = loss[i], state[3] = slope[i], state[4] = bias_slope[i];
    }
  }
};

// S(x) = 1 / (1 + e^-x)
template <class V>
V sigmoid(V x) {
  const V e = exp(vmin(x, -x)), large = 1 / (1 + e);
  return select(x >= V{}, large, e * large);
}

inline double log_one_plus(double x) { return std::log1p(x); }
// log(1 + x) of any x >= 0: the logarithm of the rounded sum, and what the rounding left.
inline VecF log_one_plus(VecF x) {
  const VecF sum = 1.f + x;
  return log(sum) + (x - (sum - 1.f)) / sum;
}

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|. The logarithm is taken of a product of
// kFactors: (1 + q)(1 + e) - 1 = q + e + q e keeps the digits of small e.
constexpr int64_t kFactors = 8;

template <bool kSlopes, class A>
void add_tile(const Tile<A>& t, A scale, A bias, RowSums<A>& rows) {
  using V = typename Lanes<A>::V;
  constexpr int64_t kStep = kFactors * Lanes<A>::kCount;
  for (int64_t r = 0; r < t.rows; ++r) {
    V best = V{} - A(kInf), above{}, loss{}, slope{}, bias_slope{};
    for (int64_t begin = 0; begin < t.columns; begin += kStep) {
      V product{};  // less 1
      for (int64_t c = begin; c < std::min(begin + kStep, t.columns); c += Lanes<A>::kCount) {
        const V d = load(t[r] + c), x = d * scale + bias, e = exp(vmin(x, -x));
        best = vmax(d, best);
        above += vmax(V{}, x);
        product = product * e + (product + e);
        if constexpr (kSlopes) {
          const V right = sigmoid(x);
          slope += select(right == V{}, V{}, right * d);
          bias_slope += right;
        }
      }
      loss += log_one_plus(product);
    }
    const int64_t i = t.row + r;
    rows.best[i] = std::max(rows.best[i], A(max(best)));
    rows.loss[i] += sum(above) + sum(loss);
    rows.slope[i] += sum(slope);
    rows.bias_slope[i] += sum(bias_slope);
  }
}

template <class P>
void forward(const SigLIP& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  RowSums<A> rows(s.rows.count);
  if (a.before) rows.read(a.before);
  for_each_product<P>(s, Norms<A>(s), false, [&](const Tile<A>& tile, Worker<P>&) {
    tile.along(s.label_offset, [&](int64_t i, int64_t, A& d) {
      rows.positive[i] = d;
      d = -kInf;
    });
    const auto add = a.need_slopes ? add_tile<true, A> : add_tile<false, A>;
    add(tile, A(s.scale), A(a.logit_bias), rows);
  });
  if (a.after) rows.write(a.after);
  for (int64_t i = 0; i < s.rows.count; ++i) {
    const double d = rows.positive[i];
    const Logistic<double> own = logistic(d * s.scale + a.logit_bias);
    const A loss = A(rows.loss[i] - own.log_right);
    static_cast<A*>(a.losses)[i] = loss;
    // a maximum does not see NaN
    static_cast<A*>(a.right)[i] = rows.positive[i] > rows.best[i] && loss == loss;
    if (a.need_slopes) {
      a.slopes[i] = rows.slope[i] - own.wrong * d;
      a.bias_slopes[i] = rows.bias_slope[i] - own.wrong;
    }
  }
}

// d of a tile becomes the coefficients of the gradient, but for the positives', which go apart.
template <class P, class A>
void coefficients(const SigLIP& a, const Tile<A>& t, Worker<P>& w, A* positives) {
  using V = typename Lanes<A>::V;
  const A scale = A(a.similarity.scale), bias = A(a.logit_bias);
  const A* row_weights = static_cast<const A*>(a.grad_losses);
  const A* column_weights = static_cast<const A*>(a.grad_column_losses);
  A* columns = w.array(0);
  for (int64_t c = 0; c < w.stride; ++c)
    columns[c] = column_weights && c < t.columns ? column_weights[t.column + c] : A(0);
  t.along(a.similarity.label_offset, [&](int64_t i, int64_t j, A& d) {
    const A weight = (row_weights ? row_weights[i] : A(0)) + columns[j - t.column];
    positives[i] = A(-weight * logistic(d * a.similarity.scale + a.logit_bias).wrong);
  });
  for (int64_t r = 0; r < t.rows; ++r) {
    const A row = row_weights ? row_weights[t.row + r] : A(0);
    for (int64_t c = 0; c < t.columns; c += Lanes<A>::kCount) {
      const V right = sigmoid(V(load(t[r] + c) * scale + bias));
      store(t[r] + c, (row + load(columns + c)) * right);
    }
  }
  t.along(a.similarity.label_offset, [](int64_t, int64_t, A& coefficient) { coefficient = 0; });
}

template <class P>
void backward(const SigLIP& a) {
  using A = typename P::Scalar;
  const Similarity& s = a.similarity;
  const Norms<A> norms(s);
  Gradient<A> grad_rows(s.rows, a.grad_rows, s.unrounded);
  Gradient<A> grad_columns(s.columns, a.grad_columns, s.unrounded);
  Workspace<A> positives(s.rows.count);
  for_each_product<P>(s, norms, true, [&](const Tile<A>& tile, Worker<P>& w) {
    coefficients(a, tile, w, positives.data());
    if (grad_rows) P::add_to_left(grad_rows.row(tile.row), tile, w.right, w.scratch, true);
    if (grad_columns) P::add_to_right(grad_columns.row(tile.column), tile, w.left, w.scratch, true);
  });
  add_pairs(s.rows, norms.rows(), grad_rows, s.columns, norms.columns(), grad_columns,
            s.label_offset, [&](int64_t i) { return positives.data()[i]; });
  grad_rows.finish(norms.rows(), s.normalize, s.scale);
  grad_columns.finish(norms.columns(), s.normalize, s.scale);
}

}  // namespace

void siglip_loss_fwd(const SigLIP& a) {
  with_products(a.similarity, [&](auto products) { forward<decltype(products)>(a); });
}

void siglip_loss_bwd(const SigLIP& a) {
  with_products(a.similarity, [&](auto products) { backward<decltype(products)>(a); });
}

}  // namespace apt::APT_ISA
