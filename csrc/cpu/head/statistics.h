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
        weights_(tiles.weight_blocks({true, false, wanted.gradient ? group : 0})),
        tile_(tiles.workers * std::min(kRowBlock, group) * tiles.stride),
        weighted_(wanted.gradient ? tiles.workers * group * tiles.features : 0),
        shifts_(wanted.gradient ? tiles.workers * group : 0),
        stats_(tiles.count * group),
        sums_(wanted.sum_logits ? tiles.count * group : 0),
        largest_(wanted.first_largest ? tiles.workers * group : 0),
        tokens_(group) {}

  // terms(i) gives token and temperature of row i of `hidden`; stored: where to keep the logits,
  // [tile][row][column], or null.
  template <class Terms>
  void run(const Block& hidden, int64_t size, const Terms& terms, A* stored) {
    tiles_.each_worker([&](int64_t worker, int64_t begin, int64_t end) {
      if (wanted_.gradient) std::fill_n(shifts_.data() + worker * group_, size, -double(kInf));
      if (wanted_.first_largest)
        std::fill_n(largest_.data() + worker * group_, size, Largest{A(-kInf), 0});
      typename P::Scratch scratch(wanted_.gradient ? std::min(kRowBlock, size) : 0, tiles_.columns);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t width = tiles_.width(tile);
        Block& weight = weights_[worker];
        tiles_.load_weight(tile, weight);
        for (int64_t row = 0; row < size; row += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, size - row);
          A* x = stored ? stored + (tile * size + row) * tiles_.stride
                        : tile_.data() + worker * std::min(kRowBlock, group_) * tiles_.stride;
          const Coefficients<A> c =
              tiles_.logits(hidden, row, rows, weight, tile, x, [&](int64_t r) {
                use_row(worker, tile, row + r, terms(row + r), x + r * tiles_.stride, width);
              });
          if (wanted_.gradient)
            P::add_to_left(weighted(worker, row), c, weight, scratch, tile != begin);
        }
      }
    });
  }

  RowStats stats(int64_t row) const {
    RowStats total = empty_row();
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      const TileStats& part = stats_.data()[tile * group_ + row];
      merge(total, {part.shift, part.sum_exp, part.sum_zexp});
    }
    return total;
  }
  double sum_logits(int64_t row) const {
    double total = 0;
    for (int64_t tile = 0; tile < tiles_.count; ++tile) total += sums_.data()[tile * group_ + row];
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
      const double shift = shifts_.data()[w * group_ + row];
      if (shift == -kInf) continue;
      const A factor = A(std::exp(shift - total.shift) / total.sum_exp);
      const A* sum = weighted(w, row);
      for (int64_t j = 0; j < d; ++j) scratch[j] += factor * sum[j];
    }
    for (int64_t j = 0; j < d; ++j) scratch[j] *= scale;
    from_arithmetic(scratch, out, d);
  }

 private:
  // RowStats of one tile, which are exact in A. They go on in the order of the tiles: whoever
  // computes them, and beside whichever rows, the row has the same bits.
  struct TileStats {
    A shift, sum_exp, sum_zexp;
  };
  static_assert(sizeof(TileStats) == kTileStatistics * sizeof(A));
  struct Largest {
    A logit;
    int64_t column;
  };

  void use_row(int64_t worker, int64_t tile, int64_t row, const RowTerms& terms, A* x,
               int64_t width) {
    RowStats stats = empty_row();
    const int64_t picked = tiles_.picked(tile, terms.token);
    if (picked >= 0) tokens_.data()[row] = x[picked];
    functions_.add(stats, x, width, terms.temperature, softcap_);
    stats_.data()[tile * group_ + row] = {A(stats.shift), A(stats.sum_exp), A(stats.sum_zexp)};
    if (wanted_.first_largest) find_largest(worker, tile, row, x, width);
    if (wanted_.sum_logits) sums_.data()[tile * group_ + row] = functions_.sum(x, width, softcap_);
    if (!wanted_.gradient) return;
    if (stats.shift == -kInf) {
      std::fill_n(x, width, A(0));
      return;
    }
    double& shift = shifts_.data()[worker * group_ + row];
    if (!(stats.shift <= shift + kSlack)) {
      const A scale = A(shift == -kInf ? 1 : std::exp(shift - stats.shift));
      A* sum = weighted(worker, row);
      for (int64_t j = 0; scale != 1 && j < tiles_.features; ++j) sum[j] *= scale;
      shift = stats.shift;
    }
    RowTerms relative = terms;  // -e^(z - shift) z'
    relative.lse = shift;
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
  Workspace<double> shifts_;    // [workers, group]: of `weighted`
  Workspace<TileStats> stats_;  // [tiles, group]
  Workspace<double> sums_;      // [tiles, group]
  Workspace<Largest> largest_;  // [workers, group]
  Workspace<A> tokens_;         // [group]
};

}  // namespace apt::APT_ISA
