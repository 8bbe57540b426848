// Products by micro-kernels: so many rows and vectors of the result as there are registers, a panel
// of the right factor streaming past them from the second cache, a strip of the left one's rows in
// the first. Rows are not packed: a broadcast reads them where they lie.
// M says how words are multiplied: Word, Sum, the vectors W and V of them, splat and add.
#pragma once
#include <algorithm>

#include "common/panel_product.h"
#include "common/simd.h"

namespace apt::APT_ISA {

#if defined(__AVX512F__)
constexpr int kStripRows = 14, kPanelVectors = 2;  // and 3 of 32 registers for the factors
#elif defined(__aarch64__)
constexpr int kStripRows = 8, kPanelVectors = 3;
#else
constexpr int kStripRows = 6, kPanelVectors = 2;  // 12 of 16 registers
#endif

// Additions of one sum in a row: more would lose digits, fewer cost time. Longer sums are added up
// from such parts.
constexpr int64_t kLongestSum = 256;
// Panels of the right factor that stay in the second cache while all strips pass.
constexpr int64_t kPanelBytes = int64_t{768} << 10;
constexpr int kWordsAhead = 16;  // rows of a panel that travel meanwhile

template <class M>
constexpr int64_t kPanel = kPanelVectors * int64_t(sizeof(typename M::V) / sizeof(typename M::Sum));

// A part of k for R rows and one panel, `width` columns of which are stored.
template <class M, int R, bool kSideBySide>
void multiply_block(const typename M::Word* a, int64_t a_stride, const typename M::Word* b,
                    int64_t b_step, int64_t k, typename M::Sum* out, int64_t out_stride,
                    bool accumulate, int64_t width) {
  using Word = typename M::Word;
  using Sum = typename M::Sum;
  using V = typename M::V;
  using W = typename M::W;
  constexpr int kLength = int(sizeof(V) / sizeof(Sum));
  V sums[R][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = V{};
  const Word* rows[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) rows[i] = a + i * (kSideBySide ? 1 : a_stride);
#pragma GCC unroll 2
  for (int64_t at = 0; at < k; ++at) {
    W right[kPanelVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j)
      std::memcpy(&right[j], b + j * kLength, sizeof right[j]);
    for (int line = 0; line < int(kPanelVectors * sizeof(W)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(b + kWordsAhead * b_step) + line);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const W left = M::splat(kSideBySide ? a[i] : rows[i][at]);
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = M::add(sums[i][j], left, right[j]);
    }
    b += b_step;
    if constexpr (kSideBySide) a += a_stride;
  }
  const auto write = [&](Sum* to, int64_t stride, bool add) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) {
        V total = sums[i][j], before;
        Sum* p = to + i * stride + j * kLength;
        if (add) {
          std::memcpy(&before, p, sizeof before);
          total = before + total;
        }
        std::memcpy(p, &total, sizeof total);
      }
  };
  constexpr int64_t kWhole = kPanelVectors * kLength;
  if (width == kWhole) return write(out, out_stride, accumulate);
  Sum rest[R * kWhole];
  write(rest, kWhole, false);
  for (int i = 0; i < R; ++i)
    for (int64_t j = 0; j < width; ++j) {
      Sum* p = out + i * out_stride + j;
      *p = accumulate ? *p + rest[i * kWhole + j] : rest[i * kWhole + j];
    }
}

// Some panels and some part of k: what stays in the second cache.
struct PanelRange {
  int64_t column, columns, k, k_end, step;  // step: k of one sum
};

template <class M, int R, bool kSideBySide, class Product>
void multiply_strip(const Product& p, int64_t row, const PanelRange& range) {
  for (int64_t j = range.column; j < range.column + range.columns; j += kPanel<M>)
    for (int64_t k = range.k; k < range.k_end; k += range.step)
      multiply_block<M, R, kSideBySide>(
          p.a + row * p.a_row + k * p.a_step, kSideBySide ? p.a_step : p.a_row,
          p.b + j / kPanel<M> * p.b_panel + k * p.b_step, p.b_step,
          std::min(range.step, range.k_end - k), p.out + row * p.out_stride + j, p.out_stride,
          p.accumulate || k > 0, std::min(kPanel<M>, p.n - j));
}

// Strips of kStripRows, then of the largest of 8, 4, 2 and 1 that are left.
template <class M, bool kSideBySide, class Product>
void multiply_strips(const Product& p, const PanelRange& range, bool last) {
  for (int64_t row = 0; row < p.m;) {
    const int64_t first = row;
    const auto strip = [&](auto rows) {
      constexpr int kRows = rows();
      if (row != first || p.m - row < kRows) return;
      multiply_strip<M, kRows, kSideBySide>(p, row, range);
      row += kRows;
    };
    strip(std::integral_constant<int, kStripRows>{});
    if constexpr (kStripRows > 8) strip(std::integral_constant<int, 8>{});
    strip(std::integral_constant<int, 4>{});
    strip(std::integral_constant<int, 2>{});
    strip(std::integral_constant<int, 1>{});
    if (last && p.done.call) p.done.call(p.done.state, first, row - first);
  }
}

// Calls body(range, last) for ranges of panels in the order of k.
template <class Body>
void for_panel_ranges(int64_t n, int64_t k, int64_t panel, int64_t word, int64_t step,
                      const Body& body) {
  const int64_t most = std::max<int64_t>(kPanelBytes / (word * std::min(n, 8 * panel)), 1);
  const int64_t deep = std::max(step, most / step * step);
  for (int64_t at = 0; at < k; at += deep) {
    const int64_t end = std::min(k, at + deep);
    const int64_t wide = std::max(panel, kPanelBytes / (word * (end - at)) / panel * panel);
    for (int64_t column = 0; column < n; column += wide)
      body(PanelRange{column, std::min(wide, n - column), at, end, step},
           end == k && column + wide >= n);
  }
}

template <class M, class Product>
void multiply_panels(const Product& p) {
  if (p.k == 0 && !p.accumulate)
    for (int64_t i = 0; i < p.m; ++i) std::fill_n(p.out + i * p.out_stride, p.n, 0);
  const int64_t parts = std::max<int64_t>((p.k + kLongestSum - 1) / kLongestSum, 1);
  const int64_t step = (p.k + parts - 1) / parts;
  for_panel_ranges(p.n, p.k, kPanel<M>, sizeof(typename M::Word), step,
                   [&](const PanelRange& range, bool last) {
                     if (p.a_step == 1)
                       multiply_strips<M, false>(p, range, last);
                     else
                       multiply_strips<M, true>(p, range, last);
                   });
}

}  // namespace apt::APT_ISA
