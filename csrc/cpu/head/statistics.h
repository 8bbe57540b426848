// Softmax statistics of the rows of an output head, from tiles of logits that are kept or dropped.
#pragma once
#include "head/tiles.h"

namespace apt::APT_ISA {

// What a loss needs beside lse and the token's logit.
struct Wanted {
  bool gradient, sum_logits, first_largest;
};

// One group of rows at a time. wanted.gradient: also the gradient of log p[token] by the hidden
// state, z'[token] W[token] - sum_v p_v z'_v W_v, whose sum is carried relative to the row's
// shift so far, as attention carries its values: no second pass over the vocabulary.
template <class T, class P>
class HeadStatistics {
 public:
  using A = typename P::Scalar;
  using Block = typename P::Block;
  HeadStatistics(const Tiles<T, P>& tiles, const RowFunctions<A>& functions, int64_t group,
                 Wanted wanted)
      : tiles_(tiles),
        softcap_(tiles.head.softcap),
        functions_(functions),
        group_(group),
        wanted_(wanted),
        weights_(tiles.weight_blocks({true, wanted.gradient})),
        tile_(tiles.workers * std::min(kRowBlock, group) * tiles.columns),
        weighted_(wanted.gradient ? tiles.workers * group * tiles.features : 0),
        stats_(tiles.workers * group),
        sums_(tiles.workers * group),
        largest_(wanted.first_largest ? tiles.workers * group : 0),
        tokens_(group) {}

  // terms(i) gives token and temperature of row i of `hidden`; stored: where to keep the logits,
  // [tile][row][column], or null.
  template <class Terms>
  void run(const Block& hidden, int64_t size, const Terms& terms, A* stored) {
    tiles_.each_worker([&](int64_t worker, int64_t begin, int64_t end) {
      std::fill_n(stats_.data() + worker * group_, size, empty_row());
      std::fill_n(sums_.data() + worker * group_, size, 0.0);
      if (wanted_.first_largest)
        std::fill_n(largest_.data() + worker * group_, size, Largest{A(-kInf), 0});
      typename P::Scratch scratch(wanted_.gradient ? std::min(kRowBlock, size) : 0, tiles_.columns);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t width = tiles_.width(tile);
        Block& weight = weights_[worker];
        tiles_.load_weight(tile, weight);
        for (int64_t row = 0; row < size; row += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, size - row);
          A* x = stored ? stored + tiles_.begin(tile) * size + row * width
                        : tile_.data() + worker * std::min(kRowBlock, group_) * tiles_.columns;
          const Coefficients<A> c = tiles_.logits(hidden, row, rows, weight, tile, x);
          for (int64_t r = 0; r < rows; ++r)
            use_row(worker, tile, row + r, terms(row + r), c[r], width);
          if (wanted_.gradient)
            P::add_to_left(weighted(worker, row), c, weight, scratch, tile != begin);
        }
      }
    });
  }

  RowStats stats(int64_t row) const {
    RowStats total = empty_row();
    for (int64_t w = 0; w < tiles_.workers; ++w) merge(total, stats_.data()[w * group_ + row]);
    return total;
  }
  double sum_logits(int64_t row) const {
    double total = 0;
    for (int64_t w = 0; w < tiles_.workers; ++w) total += sums_.data()[w * group_ + row];
    return total;
  }
  // The first column of the largest logit; 0 where all are excluded.
  int64_t first_largest(int64_t row) const {
    Largest best = largest_.data()[row];
    for (int64_t w = 1; w < tiles_.workers; ++w) {
      const Largest& part = largest_.data()[w * group_ + row];
      if (part.logit > best.logit) best = part;
    }
    return best.column;
  }
  A token_logit(int64_t row) const { return tokens_.data()[row]; }  // x, not z

  // d log p[token] / d hidden of a row; `scratch` has room for it.
  void write_gradient(int64_t row, const RowTerms& terms, A* scratch, T* out) const {
    const int64_t d = tiles_.features;
    const A scale = A(tiles_.head.logit_scale);
    const RowStats total = stats(row);
    const T* token = static_cast<const T*>(tiles_.head.weight) + terms.token * d;
    // NaN, as log p is, where every column is excluded
    const double one = total.shift == -kInf ? total.shift - total.shift : 1.0;
    const A at_token = A(one * functions_.slope(token_logit(row), terms.temperature, softcap_));
    for (int64_t j = 0; j < d; ++j) scratch[j] = at_token * arithmetic_value(token[j]);
    for (int64_t w = 0; w < tiles_.workers; ++w) {
      const RowStats& part = stats_.data()[w * group_ + row];
      if (part.shift == -kInf) continue;
      const A factor = A(std::exp(part.shift - total.shift) / total.sum_exp);
      const A* sum = weighted(w, row);
      for (int64_t j = 0; j < d; ++j) scratch[j] += factor * sum[j];
    }
    for (int64_t j = 0; j < d; ++j) scratch[j] *= scale;
    from_arithmetic(scratch, out, d);
  }

 private:
  struct Largest {
    A logit;
    int64_t column;
  };

  void use_row(int64_t worker, int64_t tile, int64_t row, const RowTerms& terms, A* x,
               int64_t width) {
    RowStats& stats = stats_.data()[worker * group_ + row];
    const double before = stats.shift;
    const int64_t picked = tiles_.picked(tile, terms.token);
    if (picked >= 0) tokens_.data()[row] = x[picked];
    functions_.add(stats, x, width, terms.temperature, softcap_);
    if (wanted_.first_largest) find_largest(worker, tile, row, x, width);
    if (wanted_.sum_logits)
      sums_.data()[worker * group_ + row] += functions_.sum(x, width, softcap_);
    if (!wanted_.gradient) return;
    if (stats.shift == -kInf) {
      std::fill_n(x, width, A(0));
      return;
    }
    if (before != stats.shift && before != -kInf) {
      const A scale = A(std::exp(before - stats.shift));
      A* sum = weighted(worker, row);
      for (int64_t j = 0; j < tiles_.features; ++j) sum[j] *= scale;
    }
    RowTerms relative = terms;  // -e^(z - shift) z'
    relative.lse = stats.shift;
    relative.grad = 1;
    relative.uniform = relative.pick = 0;
    functions_.write_gradient(x, width, relative, softcap_, -1);
  }

  void find_largest(int64_t worker, int64_t tile, int64_t row, const A* x, int64_t width) {
    Largest& best = largest_.data()[worker * group_ + row];
    const A largest = functions_.largest(x, width);
    if (largest > best.logit)
      best = {largest, tiles_.begin(tile) + (std::find(x, x + width, largest) - x)};
  }

  A* weighted(int64_t worker, int64_t row) const {
    return weighted_.data() + (worker * group_ + row) * tiles_.features;
  }

  const Tiles<T, P>& tiles_;
  double softcap_;
  RowFunctions<A> functions_;
  int64_t group_;
  Wanted wanted_;
  std::deque<Block> weights_;  // of the workers
  Workspace<A> tile_, weighted_;
  Workspace<RowStats> stats_;   // [workers, group]
  Workspace<double> sums_;      // [workers, group]
  Workspace<Largest> largest_;  // [workers, group]
  Workspace<A> tokens_;         // [group]
};

}  // namespace apt::APT_ISA
