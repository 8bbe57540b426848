// Products of bfloat16 rows in the processor's own bfloat16 products, summed in float. The rows are
// multiplied as they came, exactly, and the dot products scaled to unit rows in float; towards the
// gradient the coefficients are rounded to bfloat16, with the scale of the rows in them.
#pragma once
#include "similarity_tiles.h"

#if defined(__AVX512F__)
namespace apt::APT_ISA {

// In words: the even row's (or column's) bfloat16 in the lower half, as oneDNN's kernels read them.
inline VecU pair(VecF even, VecF odd) {
  return (rounded_to_bf16(even) >> 16) | (rounded_to_bf16(odd) & 0xffff0000u);
}

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

// out [columns, rows] = in [rows, columns] of words.
inline void transpose_words(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns,
                            uint32_t* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes > rows || c + kLanes > columns) {
        for (int64_t i = r; i < std::min<int64_t>(r + kLanes, rows); ++i)
          for (int64_t k = c; k < std::min<int64_t>(c + kLanes, columns); ++k)
            out[k * out_stride + i] = in[i * in_stride + k];
        continue;
      }
      VecU words[kLanes];
      for (int k = 0; k < kLanes; ++k)
        std::memcpy(&words[k], in + (r + k) * in_stride + c, sizeof words[k]);
      transpose(words);
      for (int k = 0; k < kLanes; ++k)
        std::memcpy(out + (c + k) * out_stride + r, &words[k], sizeof words[k]);
    }
}

struct BFloat16Products {
  using Scalar = float;

  struct Block {
    int64_t count = 0, width, even;  // even: the width rounded up to pairs
    const float* inverse = nullptr;
    Workspace<uint16_t> rows;       // [count, even]
    Workspace<uint32_t> pairs;      // [even / 2, count]: pairs of columns, the rows side by side
    Workspace<uint32_t> row_pairs;  // [count / 2 rounded up, width]: pairs of rows
    Block(int64_t longest, int64_t w)
        : width(w),
          even(round_up(w, 2)),
          rows((longest + 1) * even),
          pairs(even / 2 * longest),
          row_pairs((longest + 1) / 2 * width) {}

    void load(const Rows& from, int64_t first, int64_t n, const float* inverse_norms) {
      count = n;
      inverse = inverse_norms + first;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r, part = row >= from.first_count;
        const uint16_t* x = static_cast<const uint16_t*>(from.data[part]) +
                            (row - part * from.first_count) * from.row_stride[part];
        const int64_t step = from.column_stride[part];
        uint16_t* to = rows.data() + r * even;
        to[even - 1] = 0;
        if (step == 1) {
          std::memcpy(to, x, width * sizeof *to);
        } else {
          for (int64_t c = 0; c < width; ++c) to[c] = x[c * step];
        }
        if (inverse[r] == 0) std::fill_n(to, even, 0);  // no direction: zero whatever it holds
      }
      std::fill_n(rows.data() + n * even, even, 0);  // the other half of a last odd row
      transpose_words(reinterpret_cast<const uint32_t*>(rows.data()), even / 2, n, even / 2,
                      pairs.data(), n);
      for (int64_t r = 0; r < n; r += 2) {
        const uint16_t *lower = rows.data() + r * even, *upper = lower + even;
        for (int64_t c = 0; c < width; ++c)
          row_pairs.data()[r / 2 * width + c] = lower[c] | uint32_t{upper[c]} << 16;
      }
    }
  };

  struct Scratch {
    int64_t stride;  // in words, for rows of up to `length` coefficients
    Workspace<uint32_t> coefficients;
    explicit Scratch(int64_t length)
        : stride(round_up(length, 2 * kLanes) / 2), coefficients(length * stride) {}
  };

  static void similarities(const Tile<float>& t, const Block& left, const Block& right) {
    multiply_bfloat16(t.rows, t.columns, left.even, left.rows.data() + t.left * left.even,
                      left.even, right.pairs.data() + t.right, right.count, t.data, t.stride,
                      false);
    const float* columns = right.inverse + t.right;
    for (int64_t r = 0; r < t.rows; ++r) {
      const float row = left.inverse[t.left + r];
      float* d = t[r];
      for (int64_t c = 0; c < t.columns; ++c) d[c] *= row * columns[c];
    }
  }

  // out [t.rows, width] += t * unit rows of the right
  static void add_to_rows(float* out, const Tile<float>& t, const Block& right, Scratch& s) {
    const float* inverse = right.inverse + t.right;
    uint16_t* coefficients = reinterpret_cast<uint16_t*>(s.coefficients.data());
    for (int64_t r = 0; r < t.rows; ++r) {
      BFloat16* to = reinterpret_cast<BFloat16*>(coefficients + r * 2 * s.stride);
      int64_t c = 0;
      for (; c + kLanes <= t.columns; c += kLanes)
        store(to + c, load(t[r] + c) * load(inverse + c));
      for (; c < t.columns; ++c) from_float(t[r][c] * inverse[c], to + c);
      if (c % 2) to[c].bits = 0;
    }
    multiply_bfloat16(t.rows, right.width, round_up(t.columns, 2), coefficients, 2 * s.stride,
                      right.row_pairs.data() + t.right / 2 * right.width, right.width, out,
                      right.width, true);
  }

  // out [t.columns, width] += t^T * unit rows of the left
  static void add_to_columns(float* out, const Tile<float>& t, const Block& left, Scratch& s) {
    const auto row = [&](int64_t i, int64_t c) {
      return i < t.rows ? load(t[i] + c) * left.inverse[t.left + i] : VecF{};
    };
    for (int64_t r = 0; r < t.rows; r += 2 * kLanes)
      for (int64_t c = 0; c < t.columns; c += kLanes) {
        VecU words[kLanes];
        for (int k = 0; k < kLanes; ++k) words[k] = pair(row(r + 2 * k, c), row(r + 2 * k + 1, c));
        transpose(words);
        const int64_t count = std::min<int64_t>(kLanes, t.columns - c);
        for (int64_t k = 0; k < count; ++k)
          std::memcpy(s.coefficients.data() + (c + k) * s.stride + r / 2, &words[k],
                      sizeof words[k]);
      }
    multiply_bfloat16(t.columns, left.width, round_up(t.rows, 2),
                      reinterpret_cast<uint16_t*>(s.coefficients.data()), 2 * s.stride,
                      left.row_pairs.data() + t.left / 2 * left.width, left.width, out, left.width,
                      true);
  }
  static void finish() { release_bfloat16_products(); }
};

}  // namespace apt::APT_ISA
#endif

namespace apt::APT_ISA {

// Below this many multiplications the processor's bfloat16 products do not pay for their packing.
constexpr int64_t kSmallestBFloat16Work = int64_t{1} << 22;

// Calls body with the kind of products that suits the rows.
template <class Body>
void with_products(const Similarity& s, const Body& body) {
  if (s.wide) return body(UnitProducts<double>{});
#if defined(__AVX512F__)
  const bool bfloat16 = s.rows.dtype == DType::bf16 && s.columns.dtype == DType::bf16;
  if (bfloat16 && has_bfloat16_products() &&
      double(s.rows.count) * s.columns.count * s.rows.width >= kSmallestBFloat16Work)
    return body(BFloat16Products{});
#endif
  body(UnitProducts<float>{});
}

}  // namespace apt::APT_ISA
