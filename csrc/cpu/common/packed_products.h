// Products by oneDNN's small-matrix kernels, which PyTorch lends: faster than its BLAS on some
// processors, and the only products of bfloat16 with results in float. They want the right factor
// of a product with its columns side by side, and bfloat16 in pairs; the blocks pack that once.
#pragma once
#include "common/products.h"

#if defined(__AVX512F__)
namespace apt::APT_ISA {

template <uint32_t... kFrom>
inline VecU shuffle(VecU a, VecU b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, VecU{kFrom...});
#endif
}

inline VecU even_quarters(VecU a, VecU b) {
  return shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b);
}
inline VecU odd_quarters(VecU a, VecU b) {
  return shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b);
}

// Transposes 16 x 16 words: words and pairs of words within quarters, then the quarters.
inline void transpose(VecU* w) {
  VecU v[16];
  for (int i = 0; i < 16; i += 2) {
    v[i] = shuffle<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(w[i], w[i + 1]);
    v[i + 1] = shuffle<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(w[i], w[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      const VecU a = v[i + k], b = v[i + 2 + k];
      w[i + 2 * k] = shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
      w[i + 2 * k + 1] = shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
    }
  for (int half = 0; half < 16; half += 8)
    for (int k = 0; k < 4; ++k) {
      v[half + k] = even_quarters(w[half + k], w[half + 4 + k]);
      v[half + 4 + k] = odd_quarters(w[half + k], w[half + 4 + k]);
    }
  for (int k = 0; k < 8; ++k) {
    w[k] = even_quarters(v[k], v[8 + k]);
    w[k + 8] = odd_quarters(v[k], v[8 + k]);
  }
}

// A vector of words, or the first `count` of one and zeros.
template <class V = VecU, class E>
inline V load_words(const E* p, int64_t count) {
  V words{};
  if (count >= kLanes) {
    std::memcpy(&words, p, sizeof words);
  } else {
    std::memcpy(&words, p, size_t(count) * sizeof(uint32_t));
  }
  return words;
}

// out [columns, rows rounded up to a vector] = words [rows, columns], which word(r, c, count) gives
// a vector at a time, of which `count` matter.
template <class Word>
void transpose_words(int64_t rows, int64_t columns, uint32_t* out, int64_t out_stride,
                     const Word& word) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, columns - c);
      VecU words[kLanes];
      for (int k = 0; k < kLanes; ++k) words[k] = r + k < rows ? word(r + k, c, count) : VecU{};
      transpose(words);
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(out + (c + k) * out_stride + r, &words[k], sizeof words[k]);
    }
}

// float32: everything as the BLAS does it, from copies that are transposed.
struct PackedFloatProducts {
  using Scalar = float;
  using Element = float;
  static constexpr int64_t kTileColumns = 256;

  struct Block : RowBlock<float> {
    int64_t columns_stride;
    Workspace<uint32_t> columns;  // [width, columns_stride]
    Block(int64_t most, int64_t w, Uses uses)
        : RowBlock<float>(most, w, w),
          columns_stride(round_up(most, kLanes)),
          columns(uses.right_of_dots ? w * columns_stride : 0) {}
    void use(const float* data, int64_t n) {
      rows = data;
      if (columns.size())
        transpose_words(n, width, columns.data(), columns_stride,
                        [&](int64_t r, int64_t c, int64_t size) {
                          __builtin_prefetch(data + (r + kLanes) * width + c);
                          return load_words(data + r * width + c, size);
                        });
    }
  };
  struct Scratch {
    int64_t stride;
    Workspace<uint32_t> transposed;
    Scratch(int64_t rows, int64_t columns)
        : stride(round_up(rows, kLanes)), transposed(columns * stride) {}
  };

  static void dots(const Coefficients<float>& c, const Block& left, const Block& right,
                   bool accumulate) {
    multiply_float(c.rows, c.columns, left.width, left.rows + c.left * left.width, left.width,
                   reinterpret_cast<const float*>(right.columns.data()) + c.right,
                   right.columns_stride, c.data, c.stride, accumulate);
  }
  static void add_to_left(float* out, const Coefficients<float>& c, const Block& right, Scratch&,
                          bool accumulate) {
    multiply_float(c.rows, right.width, c.columns, c.data, c.stride,
                   right.rows + c.right * right.width, right.width, out, right.width, accumulate);
  }
  static void add_to_right(float* out, const Coefficients<float>& c, const Block& left, Scratch& s,
                           bool accumulate) {
    transpose_words(c.rows, c.columns, s.transposed.data(), s.stride,
                    [&](int64_t r, int64_t k, int64_t size) { return load_words(c[r] + k, size); });
    multiply_float(c.columns, left.width, c.rows,
                   reinterpret_cast<const float*>(s.transposed.data()), s.stride,
                   left.rows + c.left * left.width, left.width, out, left.width, accumulate);
  }
  static void finish() { release_packed_products(); }
};

// In words: the even row's (or column's) bfloat16 in the lower half, as oneDNN's kernels read them.
inline VecU pair(VecF even, VecF odd) {
  return (rounded_to_bf16(even) >> 16) | (rounded_to_bf16(odd) & 0xffff0000u);
}

// bfloat16 rows, multiplied as they are and summed in float. A block may say what its rows are to
// be multiplied by: dots are exact to the rounding of their sum; the coefficients of sums, with
// that factor, are rounded to bfloat16.
struct PackedBFloat16Products {
  using Scalar = float;
  using Element = uint16_t;
  static constexpr int64_t kTileColumns = 256;

  struct Block : RowBlock<uint16_t> {  // of an even stride, an odd width filled up with 0
    int64_t columns_stride;
    const float* factors = nullptr;  // one a row, or null: 1
    Workspace<uint32_t> columns;     // [stride / 2, columns_stride]: pairs of columns
    Workspace<uint32_t> pairs;       // [longest / 2 rounded up, width]: pairs of rows
    Block(int64_t most, int64_t w, Uses uses)
        : RowBlock<uint16_t>(most, w, round_up(w, 2)),
          columns_stride(round_up(most, kLanes)),
          columns(uses.right_of_dots ? stride / 2 * columns_stride : 0),
          pairs(uses.sums ? (most + 1) / 2 * w : 0) {}
    void use(const uint16_t* data, int64_t n, const float* row_factors = nullptr) {
      rows = data, factors = row_factors;
      if (columns.size())
        transpose_words(n, stride / 2, columns.data(), columns_stride,
                        [&](int64_t r, int64_t c, int64_t size) {
                          __builtin_prefetch(data + (r + kLanes) * stride + 2 * c);
                          return load_words(data + r * stride + 2 * c, size);
                        });
      if (!pairs.size()) return;
      for (int64_t r = 0; r < n; r += 2) {
        const uint16_t* lower = data + r * stride;
        uint32_t* to = pairs.data() + r / 2 * width;
        if (r + 1 < n) {
          for (int64_t c = 0; c < width; ++c) to[c] = lower[c] | uint32_t{lower[stride + c]} << 16;
        } else {
          for (int64_t c = 0; c < width; ++c) to[c] = lower[c];
        }
      }
    }
  };
  struct Scratch {
    int64_t row_words, column_words;  // of a row and of a column of coefficients
    Workspace<uint32_t> rounded;
    Scratch(int64_t rows, int64_t columns)
        : row_words(round_up(columns, 2 * kLanes) / 2),
          column_words(round_up(rows, 2 * kLanes) / 2),
          rounded(std::max(rows * row_words, columns * column_words)) {}
    uint16_t* data() const { return reinterpret_cast<uint16_t*>(rounded.data()); }
  };

  static void dots(const Coefficients<float>& c, const Block& left, const Block& right,
                   bool accumulate) {
    multiply_bfloat16(c.rows, c.columns, left.stride, left.rows + c.left * left.stride, left.stride,
                      right.columns.data() + c.right, right.columns_stride, c.data, c.stride,
                      accumulate);
    if (!left.factors) return;
    const float* columns = right.factors + c.right;
    for (int64_t r = 0; r < c.rows; ++r) {
      const float row = left.factors[c.left + r];
      float* d = c[r];
      for (int64_t k = 0; k < c.columns; ++k) d[k] *= row * columns[k];
    }
  }

  static void add_to_left(float* out, const Coefficients<float>& c, const Block& right, Scratch& s,
                          bool accumulate) {
    const float* factors = right.factors ? right.factors + c.right : nullptr;
    for (int64_t r = 0; r < c.rows; ++r) {
      BFloat16* to = reinterpret_cast<BFloat16*>(s.data()) + r * 2 * s.row_words;
      for (int64_t k = 0; k < c.columns; k += kLanes) {  // zeros beyond the last column
        const VecF v = load_words<VecF>(c[r] + k, c.columns - k);
        store(to + k, factors ? v * load_words<VecF>(factors + k, c.columns - k) : v);
      }
    }
    multiply_bfloat16(c.rows, right.width, round_up(c.columns, 2), s.data(), 2 * s.row_words,
                      right.pairs.data() + c.right / 2 * right.width, right.width, out, right.width,
                      accumulate);
  }

  static void add_to_right(float* out, const Coefficients<float>& c, const Block& left, Scratch& s,
                           bool accumulate) {
    const float* factors = left.factors ? left.factors + c.left : nullptr;
    const auto row = [&](int64_t r, int64_t k, int64_t size) {
      if (r >= c.rows) return VecF{};
      const VecF v = load_words<VecF>(c[r] + k, size);
      return factors ? v * factors[r] : v;
    };
    transpose_words((c.rows + 1) / 2, c.columns, s.rounded.data(), s.column_words,
                    [&](int64_t r, int64_t k, int64_t size) {
                      return pair(row(2 * r, k, size), row(2 * r + 1, k, size));
                    });
    multiply_bfloat16(c.columns, left.width, round_up(c.rows, 2), s.data(), 2 * s.column_words,
                      left.pairs.data() + c.left / 2 * left.width, left.width, out, left.width,
                      accumulate);
  }
  static void finish() { release_packed_products(); }
};

}  // namespace apt::APT_ISA
#endif
