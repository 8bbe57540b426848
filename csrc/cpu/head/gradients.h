// Gradients of an output head from the terms of its rows.
#pragma once
#include "head/tiles.h"

namespace apt::APT_ISA {

// Sums of the columns of tile [rows, width] onto (or, first, into) out.
template <class A>
void add_column_sums(const Coefficients<A>& tile, bool first, A* out) {
  constexpr int64_t kStep = 16;
  for (int64_t v = 0; v < tile.columns; v += kStep) {
    const int64_t n = std::min(kStep, tile.columns - v);
    A even[kStep] = {}, odd[kStep] = {};
    for (int64_t r = 0; r < tile.rows; ++r) {
      A* sums = r % 2 ? odd : even;
      for (int64_t i = 0; i < n; ++i) sums[i] += tile[r][v + i];
    }
    for (int64_t i = 0; i < n; ++i) out[v + i] = (first ? A(0) : out[v + i]) + (even[i] + odd[i]);
  }
}

// Into the cache, line after line: the products take another order and would wait for every one.
template <class E>
void read_ahead(const E* data, int64_t size) {
  volatile E last;
  for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(E))) last = data[i];
  (void)last;
}

// Gradients of hidden, weight and bias. Every tile of logits, stored or computed again, becomes its
// gradient in place and enters two products. The weight's gradient is summed in A: in the result
// itself, or, for 16-bit weights, in one tile a thread that all rows pass before it is rounded.
template <class T, class P>
class HeadGradients {
 public:
  using A = typename P::Scalar;
  using Block = typename P::Block;
  // stored: the logits will be given.
  HeadGradients(const Tiles<T, P>& tiles, const RowFunctions<A>& functions, int64_t row_count,
                bool stored)
      : tiles_(tiles),
        head_(tiles.head),
        functions_(functions),
        group_(std::min(tiles.group_rows(), row_count)),
        panels_(kSame || !head_.grad_weight || row_count <= group_ ? 1 : tiles.tiles_per_worker()),
        hidden_(group_, tiles.features, {false, !stored, head_.grad_weight ? tiles.head.vocab : 0}),
        weights_(tiles.weight_blocks({!stored, false, head_.grad_hidden ? group_ : 0})),
        tile_(stored ? 0 : tiles.workers * std::min(kRowBlock, row_count) * tiles.stride),
        grad_weight_(head_.grad_weight && !kSame ? tiles.workers * tiles.columns * tiles.features
                                                 : 0),
        grad_bias_(head_.grad_bias && !kSame ? head_.vocab : 0),
        partial_(head_.grad_hidden ? tiles.workers * group_ * tiles.features : 0),
        grad_hidden_(head_.grad_hidden && panels_ > 1 ? row_count * tiles.features : 0) {}

  // terms(i) are those of rows[i], rows ascending. stored: their logits [tile][row][column], or
  // null. accumulate: onto the weight's and the bias's gradients of earlier rows (T = A only).
  template <class Terms>
  void run(const int64_t* rows, int64_t count, const Terms& terms, A* stored, bool accumulate) {
    for (int64_t panel = 0; panel < panels_; ++panel)
      for (int64_t start = 0; start < count; start += group_) {
        const int64_t size = std::min(group_, count - start);
        tiles_.gather(rows + start, size, hidden_);
        const Group group{start, size, start == 0 && !accumulate, start + size == count};
        tiles_.each_worker([&](int64_t worker, int64_t begin, int64_t end) {
          typename P::Scratch scratch(std::min(kRowBlock, size), tiles_.columns);
          if (panels_ > 1) begin += panel, end = std::min(end, begin + 1);
          if (begin >= end && head_.grad_hidden)
            std::fill_n(partial(worker, 0), size * tiles_.features, A(0));
          for (int64_t tile = begin; tile < end; ++tile)
            use_tile(worker, tile, group, terms, stored, tile == begin, scratch);
        });
        if (head_.grad_hidden) add_partial(rows, start, size, panel);
      }
    if (head_.grad_bias && !kSame)
      from_arithmetic(grad_bias_.data(), static_cast<T*>(head_.grad_bias), head_.vocab);
  }

 private:
  static constexpr bool kSame = Tiles<T, P>::kSame;
  struct Group {
    int64_t start, size;
    bool first, last;
  };

  template <class Terms>
  void use_tile(int64_t worker, int64_t tile, const Group& group, const Terms& terms, A* stored,
                bool first_tile, typename P::Scratch& scratch) {
    const int64_t width = tiles_.width(tile);
    Block& weight = weights_[worker];
    if (!stored || head_.grad_hidden) tiles_.load_weight(tile, weight);
    if (head_.grad_weight && kSame && !group.first)
      read_ahead(grad_weight(worker, tile), width * tiles_.features);
    for (int64_t row = 0; row < group.size; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, group.size - row);
      A* x = stored ? stored + (tile * group.size + row) * tiles_.stride
                    : tile_.data() + worker * std::min(kRowBlock, group_) * tiles_.stride;
      const Coefficients<A> c{x, tiles_.stride, rows, width, row, 0};
      const auto write_row = [&](int64_t r) {
        RowTerms t = terms(group.start + row + r);
        for (double* term : {&t.grad, &t.pick, &t.uniform, &t.grad_entropy})
          *term *= head_.logit_scale;  // by which all gradients are multiplied
        functions_.write_gradient(c[r], width, t, head_.softcap, tiles_.picked(tile, t.token));
      };
      if (stored)
        for (int64_t r = 0; r < rows; ++r) write_row(r);
      else
        tiles_.logits(hidden_, row, rows, weight, tile, x, write_row);
      const bool first = group.first && row == 0;
      if (head_.grad_weight)
        P::add_to_right(grad_weight(worker, tile), c, hidden_, scratch, !first);
      if (head_.grad_bias) add_column_sums(c, first, grad_bias() + tiles_.begin(tile));
      if (head_.grad_hidden) P::add_to_left(partial(worker, row), c, weight, scratch, !first_tile);
    }
    if (head_.grad_weight && !kSame && group.last)
      from_arithmetic(grad_weight(worker, tile),
                      static_cast<T*>(head_.grad_weight) + tiles_.begin(tile) * tiles_.features,
                      width * tiles_.features);
  }

  A* grad_weight(int64_t worker, int64_t tile) {
    if constexpr (kSame) {
      return static_cast<A*>(head_.grad_weight) + tiles_.begin(tile) * tiles_.features;
    } else {
      return grad_weight_.data() + worker * tiles_.columns * tiles_.features;
    }
  }
  A* grad_bias() { return kSame ? static_cast<A*>(head_.grad_bias) : grad_bias_.data(); }
  A* partial(int64_t worker, int64_t row) {
    return partial_.data() + (worker * group_ + row) * tiles_.features;
  }

  // grad_hidden of a group: the sum over the threads' parts of the vocabulary.
  void add_partial(const int64_t* rows, int64_t start, int64_t size, int64_t panel) {
    const int64_t d = tiles_.features;
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        A* total = partial(0, i);
        for (int64_t worker = 1; worker < tiles_.workers; ++worker) {
          const A* more = partial(worker, i);
          for (int64_t j = 0; j < d; ++j) total[j] += more[j];
        }
        if (panels_ > 1) {
          A* sum = grad_hidden_.data() + (start + i) * d;
          for (int64_t j = 0; j < d; ++j) sum[j] = (panel == 0 ? A(0) : sum[j]) + total[j];
          total = sum;
        }
        if (panel == panels_ - 1)
          from_arithmetic(total, static_cast<T*>(head_.grad_hidden) + rows[start + i] * d, d);
      }
    });
  }

  const Tiles<T, P>& tiles_;
  const LinearHead& head_;
  RowFunctions<A> functions_;
  int64_t group_, panels_;
  Block hidden_;
  std::deque<Block> weights_;  // of the workers
  Workspace<A> tile_, grad_weight_, grad_bias_, partial_, grad_hidden_;
};

// The gradients of no rows.
inline void zero_head_gradients(const LinearHead& head) {
  const int64_t size = head.dtype == DType::f64 ? 8 : head.dtype == DType::f32 ? 4 : 2;
  const auto zero = [&](void* out, int64_t count) {
    if (out)
      parallel_for(count, 1 << 16, [&](int64_t first, int64_t last) {
        std::fill(static_cast<char*>(out) + first * size, static_cast<char*>(out) + last * size, 0);
      });
  };
  zero(head.grad_hidden, head.rows * head.features);
  zero(head.grad_weight, head.vocab * head.features);
  zero(head.grad_bias, head.vocab);
}

}  // namespace apt::APT_ISA
