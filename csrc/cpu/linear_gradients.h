// Gradients of an output head from the terms of its rows.
#pragma once
#include "linear_tiles.h"

namespace apt::APT_ISA {

// Sums of the columns of tile [rows, width], times scale, onto (or, first, into) out.
template <class A>
void add_column_sums(const A* tile, int64_t rows, int64_t width, double scale, bool first, A* out) {
  constexpr int64_t kStep = 16;
  for (int64_t v = 0; v < width; v += kStep) {
    const int64_t n = std::min(kStep, width - v);
    A even[kStep] = {}, odd[kStep] = {};
    for (int64_t r = 0; r < rows; ++r) {
      A* sums = r % 2 ? odd : even;
      for (int64_t i = 0; i < n; ++i) sums[i] += tile[r * width + v + i];
    }
    for (int64_t i = 0; i < n; ++i)
      out[v + i] = (first ? A(0) : out[v + i]) + A(scale) * (even[i] + odd[i]);
  }
}

// Gradients of hidden, weight and bias. Every tile of logits, stored or computed again, becomes its
// gradient in place and enters two products. The weight's gradient is summed in A: in the result
// itself, or, for 16-bit weights, in one tile a thread that all rows pass before it is rounded.
template <class T, class A>
class HeadGradients {
 public:
  HeadGradients(const Tiles<T, A>& tiles, const RowFunctions<A>& functions, int64_t row_count)
      : tiles_(tiles),
        head_(tiles.head),
        functions_(functions),
        group_(std::min(tiles.group_rows(), row_count)),
        panels_(Tiles<T, A>::kSame || !head_.grad_weight ? 1 : tiles.tiles_per_worker()),
        tile_(tiles.workers * std::min(kRowBlock, row_count) * tiles.columns),
        weight_(tiles.workers * tiles.weight_scratch()),
        grad_weight_(head_.grad_weight ? tiles.workers * tiles.weight_scratch() : 0),
        grad_bias_(head_.grad_bias && !Tiles<T, A>::kSame ? head_.vocab : 0),
        partial_(head_.grad_hidden ? tiles.workers * group_ * tiles.features : 0),
        grad_hidden_(head_.grad_hidden && panels_ > 1 ? row_count * tiles.features : 0) {}

  // terms(i) are those of rows[i], rows ascending. stored: their logits [tile][row][column], or
  // null. accumulate: onto the weight's and the bias's gradients of earlier rows (T = A only).
  template <class Terms>
  void run(const int64_t* rows, int64_t count, const Terms& terms, A* stored, bool accumulate) {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      for (int64_t start = 0; start < count; start += group_) {
        const int64_t size = std::min(group_, count - start);
        const A* hidden = tiles_.gather(rows + start, size, gathered_);
        const bool first = start == 0 && !accumulate;
        tiles_.each_worker([&](int64_t worker, int64_t begin, int64_t end) {
          if (panels_ > 1) begin += panel, end = std::min(end, begin + 1);
          if (begin >= end && head_.grad_hidden)
            std::fill_n(partial_.data() + worker * group_ * tiles_.features, size * tiles_.features,
                        A(0));
          for (int64_t tile = begin; tile < end; ++tile)
            use_tile(worker, tile, hidden, start, size, terms, stored, tile == begin, first);
        });
        if (head_.grad_hidden) add_partial(rows, start, size, panel);
      }
      if (head_.grad_weight && !Tiles<T, A>::kSame) round_weight(panel);
    }
    if (head_.grad_bias && !Tiles<T, A>::kSame)
      from_arithmetic(grad_bias_.data(), static_cast<T*>(head_.grad_bias), head_.vocab);
  }

 private:
  template <class Terms>
  void use_tile(int64_t worker, int64_t tile, const A* hidden, int64_t start, int64_t size,
                const Terms& terms, A* stored, bool first_tile, bool first_rows) {
    const int64_t width = tiles_.width(tile), d = tiles_.features;
    const A* weight = tiles_.weight(tile, weight_.data() + worker * tiles_.weight_scratch());
    for (int64_t row = 0; row < size; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, size - row);
      A* x = stored ? stored + tiles_.begin(tile) * size + row * width
                    : tile_.data() + worker * std::min(kRowBlock, group_) * tiles_.columns;
      if (!stored) tiles_.logits(hidden + row * d, rows, weight, tile, x);
      for (int64_t r = 0; r < rows; ++r) {
        const RowTerms t = terms(start + row + r);
        functions_.write_gradient(x + r * width, width, t, head_.softcap,
                                  tiles_.picked(tile, t.token));
      }
      const bool first = first_rows && row == 0;
      const Matrix gradient = matrix(x, rows, width, width);
      if (head_.grad_weight)
        multiply(matrix(grad_weight(worker, tile), width, d, d), transposed(gradient),
                 matrix(hidden + row * d, rows, d, d), first ? 0 : 1, head_.logit_scale);
      if (head_.grad_bias)
        add_column_sums(x, rows, width, head_.logit_scale, first, grad_bias() + tiles_.begin(tile));
      if (head_.grad_hidden)
        multiply(matrix(partial_.data() + (worker * group_ + row) * d, rows, d, d), gradient,
                 matrix(weight, width, d, d), first_tile ? 0 : 1, head_.logit_scale);
    }
  }

  A* grad_weight(int64_t worker, int64_t tile) {
    if constexpr (Tiles<T, A>::kSame) {
      return static_cast<A*>(head_.grad_weight) + tiles_.begin(tile) * tiles_.features;
    } else {
      return grad_weight_.data() + worker * tiles_.weight_scratch();
    }
  }
  A* grad_bias() {
    return Tiles<T, A>::kSame ? static_cast<A*>(head_.grad_bias) : grad_bias_.data();
  }

  void round_weight(int64_t panel) {
    tiles_.each_worker([&](int64_t worker, int64_t begin, int64_t end) {
      const int64_t tile = begin + panel, d = tiles_.features;
      if (tile < end)
        from_arithmetic(grad_weight(worker, tile),
                        static_cast<T*>(head_.grad_weight) + tiles_.begin(tile) * d,
                        tiles_.width(tile) * d);
    });
  }

  // grad_hidden of a group: the sum over the threads' parts of the vocabulary.
  void add_partial(const int64_t* rows, int64_t start, int64_t size, int64_t panel) {
    const int64_t d = tiles_.features;
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        A* total = partial_.data() + i * d;
        for (int64_t worker = 1; worker < tiles_.workers; ++worker) {
          const A* more = partial_.data() + (worker * group_ + i) * d;
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

  const Tiles<T, A>& tiles_;
  const LinearHead& head_;
  RowFunctions<A> functions_;
  int64_t group_, panels_;
  Workspace<A> tile_, weight_, grad_weight_, grad_bias_, partial_, grad_hidden_, gathered_;
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
