// Products of bfloat16 rows, multiplied as they are and summed in float, where the processor does.
#pragma once
#include "common/isa.h"
#include "common/products.h"

#if defined(__AVX512F__)
#include "common/bfloat16_kernels.h"

namespace apt::APT_ISA {

// A block may say what its rows are to be multiplied by: dots are exact to the rounding of their
// sum; the coefficients of sums, with that factor, are rounded to bfloat16.
struct BFloat16Products {
  using Scalar = float;
  using Element = uint16_t;
  static constexpr int64_t kTileColumns = 256;
  static constexpr int64_t kPanel = kPanelVectors * kLanes;
  static constexpr int64_t kGroup = 32;  // elements of a tile's row: sums are filled up with zeros

  struct Block {
    int64_t longest, width, stride;  // stride: of rows in room(), filled up with zeros
    const float* factors = nullptr;  // one a row, or null: 1
    const uint16_t* rows = nullptr;  // of the left one
    int64_t rows_stride = 0;
    int64_t row_words, column_words;  // pairs of a row's elements, of a column's
    // [longest / kPanel][row_words][kPanel] and [width / kPanel][column_words][kPanel]
    Workspace<uint32_t> columns, panels;
    Block(int64_t most, int64_t w, Uses uses)
        : longest(most),
          width(w),
          stride(apart<uint16_t>(round_up(w, kGroup))),
          row_words(round_up(w, kGroup) / 2),
          column_words(round_up(most, kGroup) / 2),
          columns(uses.right_of_dots ? round_up(most, kPanel) * row_words : 0),
          panels(uses.sums ? round_up(w, kPanel) * column_words : 0),
          left_(uses.left_of_dots) {}
    uint16_t* room() {
      if (own_.size() == 0) own_.allocate(longest * stride);
      return own_.data();
    }
    void use(const uint16_t* data, int64_t n, int64_t data_stride,
             const float* row_factors = nullptr) {
      factors = row_factors;
      const bool whole = width % kGroup == 0 && apart<uint16_t>(data_stride) == data_stride;
      if (data != own_.data() && ((left_ && !whole) || width % 2)) {
        copy_rows(data, n, data_stride);
        data = own_.data(), data_stride = stride;
      }
      parallel_for(round_up(n, kCut) / kCut, kPackGrain / kCut, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kCut, size = std::min(end * kCut, n) - first;
        if (columns.size()) pack_columns(data, data_stride, first, size);
        if (panels.size()) pack_panels(data, data_stride, first, size);
      });
      rows = data, rows_stride = data_stride;
    }

   private:
    void copy_rows(const uint16_t* data, int64_t n, int64_t data_stride) {
      uint16_t* to = room();
      parallel_for(n, kPackGrain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          std::copy_n(data + r * data_stride, width, to + r * stride);
          std::fill(to + r * stride + width, to + (r + 1) * stride, 0);
        }
      });
    }

    void pack_columns(const uint16_t* data, int64_t data_stride, int64_t first, int64_t size) {
      const int64_t words = (width + 1) / 2;
      transpose_words(
          size, round_up(size, kPanel), words,
          [&](int64_t r, int64_t c, int64_t count) {
            const uint16_t* p = data + (first + r) * data_stride + 2 * c;
            __builtin_prefetch(p + kLanes * data_stride);
            return load_words(p, count);
          },
          [&](int64_t r, int64_t c, VecU column) {
            std::memcpy(column_at(first + r, c), &column, sizeof column);
          });
      for (int64_t r = first; r < first + size; r += kPanel)
        std::fill(column_at(r, words), column_at(r, row_words), 0);
    }
    uint32_t* column_at(int64_t r, int64_t c) {
      return columns.data() + (r / kPanel * row_words + c) * kPanel + r % kPanel;
    }

    // Pairs of rows; zeros beyond the last.
    void pack_panels(const uint16_t* data, int64_t data_stride, int64_t first, int64_t size) {
      for (int64_t r = first; r < first + round_up(size, kGroup); r += 2)
        for (int64_t c = 0; c < width; c += kPanel) {
          uint32_t* to = panels.data() + (c / kPanel * column_words + r / 2) * kPanel;
          const int64_t count = std::min(kPanel, width - c);
          const uint16_t* lower = data + r * data_stride + c;
          const uint16_t* upper = lower + data_stride;
          if (r + 1 < first + size) {
            for (int64_t i = 0; i < count; ++i) to[i] = lower[i] | uint32_t{upper[i]} << 16;
          } else if (r < first + size) {
            for (int64_t i = 0; i < count; ++i) to[i] = lower[i];
          } else {
            std::fill_n(to, count, 0);
          }
          std::fill(to + count, to + kPanel, 0);
        }
    }

    bool left_;
    Workspace<uint16_t> own_;
  };

  // Coefficients as a left factor: words of a row, or of a column.
  struct Scratch {
    Workspace<uint32_t> rounded;
    Scratch(int64_t rows, int64_t columns)
        : rounded(std::max(rows * words(columns), columns * words(rows))) {}
    static int64_t words(int64_t n) { return round_up(n, kGroup) / 2; }
  };

  template <class Done = Nothing>
  static void dots(const Coefficients<float>& c, const Block& left, const Block& right,
                   const Done& done = {}) {
    const auto scaled = [&](int64_t first, int64_t count) {
      if (left.factors) scale(c, left.factors + c.left, right.factors + c.right, first, count);
      done(first, count);
    };
    const uint32_t* rows = reinterpret_cast<const uint32_t*>(left.rows + c.left * left.rows_stride);
    multiply({c.rows, c.columns, left.row_words, rows, left.rows_stride / 2, 1,
              right.columns.data() + c.right * right.row_words, right.row_words * kPanel, kPanel,
              c.data, c.stride, false, rows_done(scaled)});
  }

  static void add_to_left(float* out, const Coefficients<float>& c, const Block& right, Scratch& s,
                          bool accumulate) {
    const float* factors = right.factors ? right.factors + c.right : nullptr;
    const int64_t words = s.words(c.columns);
    for (int64_t r = 0; r < c.rows; ++r) {
      BFloat16* to = reinterpret_cast<BFloat16*>(s.rounded.data() + r * words);
      for (int64_t k = 0; k < 2 * words; k += kLanes) {  // zeros beyond the last column
        const int64_t count = std::max<int64_t>(c.columns - k, 0);
        const VecF v = load_words<VecF>(c[r] + k, count);
        store(to + k, factors ? v * load_words<VecF>(factors + k, count) : v);
      }
    }
    multiply({c.rows, right.width, words, s.rounded.data(), words, 1,
              right.panels.data() + c.right / 2 * kPanel, right.column_words * kPanel, kPanel, out,
              right.width, accumulate});
  }

  static void add_to_right(float* out, const Coefficients<float>& c, const Block& left, Scratch& s,
                           bool accumulate) {
    const float* factors = left.factors ? left.factors + c.left : nullptr;
    const int64_t words = s.words(c.rows);
    const auto row = [&](int64_t r, int64_t k, int64_t count) {
      if (r >= c.rows) return VecF{};
      const VecF v = load_words<VecF>(c[r] + k, count);
      return factors ? v * factors[r] : v;
    };
    transpose_words(
        words, words, c.columns,
        [&](int64_t r, int64_t k, int64_t count) {
          return (rounded_to_bf16(row(2 * r, k, count)) >> 16) |
                 (rounded_to_bf16(row(2 * r + 1, k, count)) & 0xffff0000u);
        },
        [&](int64_t r, int64_t k, VecU column) {
          std::memcpy(s.rounded.data() + k * words + r, &column, sizeof column);
        });
    multiply({c.columns, left.width, words, s.rounded.data(), words, 1,
              left.panels.data() + c.left / 2 * kPanel, left.column_words * kPanel, kPanel, out,
              left.width, accumulate});
  }

  static void finish() {
    if (pair_products() == PairProducts::tiles) avx512_bf16::release_tiles();
  }

 private:
  static void multiply(const PairProduct& p) {
    if (pair_products() == PairProducts::tiles)
      avx512_bf16::multiply_pairs_in_tiles(p);
    else
      avx512_bf16::multiply_pairs(p);
  }
  static void scale(const Coefficients<float>& c, const float* rows, const float* columns,
                    int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r)
      for (int64_t k = 0; k < c.columns; ++k) c[r][k] *= rows[r] * columns[k];
  }
};

}  // namespace apt::APT_ISA
#endif
