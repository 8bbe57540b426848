// Products of pairs of bfloat16 with sums in float, by the instructions of AVX512-BF16 and of AMX.
// Compiled once, for processors that have them, in a namespace of their own.
#include "common/bfloat16_kernels.h"

#include <immintrin.h>

#include "common/micro_kernels.h"

namespace apt::APT_ISA {
namespace {

struct Pairs {
  using Word = uint32_t;
  using Sum = float;
  using V = VecF;
  using W = VecU;
  static W splat(uint32_t x) { return x - W{}; }
  static V add(V sum, W left, W right) {
    return bit_cast<V>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(left),
                                        bit_cast<__m512bh>(right)));
  }
};

constexpr int64_t kTile = 16;  // rows, and words of a row

// Tiles 0 to 3: sums, two of rows by two of columns. 4 and 5: left rows. 6 and 7: right columns.
void configure(int64_t upper, int64_t lower) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } tiles;
  for (const int tile : {0, 1, 2, 3, 4, 5, 6, 7}) {
    tiles.row_bytes[tile] = kTile * sizeof(uint32_t);
    tiles.rows[tile] =
        tile > 5 ? kTile : uint8_t(tile == 2 || tile == 3 || tile == 5 ? lower : upper);
  }
  asm volatile("ldtilecfg %0" ::"m"(tiles));  // GCC 12's _tile_loadconfig reads 8 bytes only
}

// Up to 32 rows (kLower: more than 16) by 32 columns.
template <bool kLower>
void multiply_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t k, float* out,
                    int64_t out_stride, bool accumulate) {
  constexpr int64_t kPanelStride = 2 * kTile * sizeof(uint32_t);
  const int64_t stride = a_row * int64_t(sizeof *a), to = out_stride * int64_t(sizeof *out);
  float* below = out + kTile * out_stride;
  asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
  if (accumulate) {
    _tile_loadd(0, out, to);
    _tile_loadd(1, out + kTile, to);
    if constexpr (kLower) {
      _tile_loadd(2, below, to);
      _tile_loadd(3, below + kTile, to);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t at = 0; at < k; at += kTile) {
    const uint32_t* right = b + at * 2 * kTile;
    _tile_loadd(4, a + at, stride);
    _tile_loadd(6, right, kPanelStride);
    _tile_loadd(7, right + kTile, kPanelStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, a + at + kTile * a_row, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, to);
  _tile_stored(1, out + kTile, to);
  if constexpr (kLower) {
    _tile_stored(2, below, to);
    _tile_stored(3, below + kTile, to);
  }
}

void multiply_strip(const PairProduct& p, int64_t row, int64_t rows, const PanelRange& range) {
  constexpr int64_t kWide = 2 * kTile;
  const bool accumulate = p.accumulate || range.k > 0;
  const uint32_t* a = p.a + row * p.a_row + range.k;
  float part[kWide * kWide];  // of the last columns
  for (int64_t j = range.column; j < range.column + range.columns; j += kWide) {
    const int64_t width = std::min(kWide, p.n - j);
    float* out = p.out + row * p.out_stride + j;
    float* to = width == kWide ? out : part;
    const int64_t to_stride = width == kWide ? p.out_stride : kWide;
    if (width < kWide && accumulate)
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(out + r * p.out_stride, width, part + r * kWide);
    const uint32_t* b = p.b + j / kWide * p.b_panel + range.k * kWide;
    if (rows > kTile)
      multiply_tiles<true>(a, p.a_row, b, range.k_end - range.k, to, to_stride, accumulate);
    else
      multiply_tiles<false>(a, p.a_row, b, range.k_end - range.k, to, to_stride, accumulate);
    if (width < kWide)
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(part + r * kWide, width, out + r * p.out_stride);
  }
}

}  // namespace

void multiply_pairs(const PairProduct& p) { multiply_panels<Pairs>(p); }

void multiply_pairs_in_tiles(const PairProduct& p) {
  constexpr int64_t kRows = 2 * kTile;
  static_assert(kPanel<Pairs> == 2 * kTile);
  const int64_t whole = p.m / kRows * kRows, rest = p.m - whole;
  for_panel_ranges(p.n, p.k, kPanel<Pairs>, sizeof(uint32_t), kTile,
                   [&](const PanelRange& range, bool last) {
                     if (whole) configure(kTile, kTile);
                     for (int64_t row = 0; row < p.m; row += kRows) {
                       const int64_t rows = std::min(kRows, p.m - row);
                       if (rows < kRows)
                         configure(std::min(rest, kTile), std::max<int64_t>(rest - kTile, 1));
                       multiply_strip(p, row, rows, range);
                       if (last && p.done.call) p.done.call(p.done.state, row, rows);
                     }
                   });
}

void release_tiles() { _tile_release(); }

}  // namespace apt::APT_ISA
