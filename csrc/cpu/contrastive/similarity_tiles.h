// Tiles of the similarity matrix that stay in the L2 cache, multiplied as products.h says. A
// product of unit rows is exact to the rounding of its sum; bfloat16 rows are multiplied as they
// are, and the products scaled in float. Memory: a tile and two blocks of rows a thread.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "common/bfloat16_products.h"
#include "contrastive/similarity_rows.h"

namespace apt::APT_ISA {

// Rows are loaded in blocks; tiles of two blocks are cut into squares that stay in the L2 cache.
constexpr int64_t kSquare = round_up(256, kCut), kLargestBlock = 2 * kSquare;  // rows
constexpr int64_t kSmallestBlock = 64;
constexpr int64_t kBlocksPerThread = 4;

// Blocks of equal length but the last, cut where products may be.
struct Blocks {
  int64_t total, size, count;
  Blocks(int64_t rows, int64_t threads, int64_t largest = kLargestBlock) : total(rows) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t wanted =
        std::min(threads > 1 ? kBlocksPerThread * threads : 1, ceil_div(rows, kSmallestBlock));
    const int64_t least = std::max({ceil_div(rows, largest), wanted, int64_t{1}});
    size = round_up(std::max<int64_t>(ceil_div(rows, least), 1), kCut);
    count = ceil_div(rows, size);
  }
  int64_t begin(int64_t i) const { return std::min(total, i * size); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t longest() const { return std::min(total, size); }
};

// Calls body(worker, i, j) for all pairs of blocks (i <= j in a triangle) in rounds, in none of
// which a block of rows or columns occurs twice: what a pair adds to its rows and columns needs no
// lock, and the order of the sums does not depend on the threads.
template <class Body>
void for_each_pair(int64_t row_blocks, int64_t column_blocks, bool triangle, const Body& body) {
  const int64_t least = std::min(row_blocks, column_blocks);
  for (int64_t round = 0; least && round < std::max(row_blocks, column_blocks); ++round) {
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t k = 0; k < least; ++k) {
      if (triangle) {
        const int64_t other = (round - k + least) % least;
        if (k <= other) pairs.emplace_back(k, other);
      } else if (row_blocks <= column_blocks) {
        pairs.emplace_back(k, (k + round) % column_blocks);
      } else {
        pairs.emplace_back((k + round) % row_blocks, k);
      }
    }
    std::atomic<size_t> next{0};
    const int64_t workers = std::min<int64_t>(max_threads(), pairs.size());
    parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (size_t t = next++; t < pairs.size(); t = next++)
          body(worker, pairs[t].first, pairs[t].second);
    });
  }
}

// Dot products [rows, columns] of the rows from `row` on and the columns from `column` on. Columns
// beyond, up to a whole vector, are -inf.
template <class A>
struct Tile : Coefficients<A> {
  using Coefficients<A>::data, Coefficients<A>::stride;
  using Coefficients<A>::rows, Coefficients<A>::columns;
  int64_t row, column;
  bool diagonal;  // of a triangle
  // Calls body(i, j, element) for the elements of the matrix with j = i + offset in this tile.
  template <class Body>
  void along(int64_t offset, const Body& body) const {
    const int64_t end = std::min(row + rows, column + columns - offset);
    for (int64_t i = std::max(row, column - offset); i < end; ++i)
      body(i, i + offset, data[(i - row) * stride + i + offset - column]);
  }
};

// `n` rows from `first` on as unit rows. A row without a direction is zero, whatever it holds.
template <class Block, class A>
void load_block(const Rows& from, int64_t first, int64_t n, const A* inverse, Block& block) {
  load_rows(from, first, n, inverse, block.room(), block.stride);
  block.use(block.room(), n, block.stride);
}

#if defined(__AVX512F__)
// bfloat16 as they came, with the factors of unit rows: where they lie, or copied.
inline void load_block(const Rows& from, int64_t first, int64_t n, const float* inverse,
                       BFloat16Products::Block& block) {
  const auto row = [&](int64_t i) {
    const int64_t part = i >= from.first_count;
    return static_cast<const uint16_t*>(from.data[part]) +
           (i - part * from.first_count) * from.row_stride[part];
  };
  const int64_t part = first >= from.first_count, last = first + n - 1;
  const bool one_matrix = part == (last >= from.first_count) && from.column_stride[part] == 1 &&
                          from.row_stride[part] % 2 == 0;
  if (one_matrix && !std::count(inverse + first, inverse + first + n, 0.f))
    return block.use(row(first), n, from.row_stride[part], inverse + first);
  for (int64_t r = 0; r < n; ++r) {
    const uint16_t* x = row(first + r);
    const int64_t step = from.column_stride[first + r >= from.first_count];
    uint16_t* to = block.room() + r * block.stride;
    std::fill(to + block.width, to + block.stride, 0);
    if (step == 1) {
      std::memcpy(to, x, size_t(block.width) * sizeof *to);
    } else {
      for (int64_t c = 0; c < block.width; ++c) to[c] = x[c * step];
    }
    if (inverse[first + r] == 0) std::fill_n(to, block.stride, 0);
  }
  block.use(block.room(), n, block.stride, inverse + first);
}
#endif

// The memory of one thread: two blocks of rows, their tile, and kArrays arrays as long as a side.
template <class P>
struct Worker {
  using A = typename P::Scalar;
  static constexpr int64_t kArrays = 10;
  int64_t stride, tile_stride, length;  // stride: columns of the longest tile, in whole vectors
  typename P::Block left, right;
  typename P::Scratch scratch;
  Workspace<A> tile, arrays;
  Worker(int64_t rows, int64_t columns, int64_t width, bool sums)
      : stride(round_up(std::min(columns, kSquare), Lanes<A>::kCount)),
        tile_stride(apart<A>(stride)),
        length(std::max(stride, round_up(std::min(rows, kSquare), Lanes<A>::kCount))),
        left(rows, width, {false, true, sums ? columns : 0}),
        right(columns, width, {true, false, sums ? rows : 0}),
        scratch(sums ? length : 0, sums ? length : 0),
        tile(length * tile_stride),
        arrays(kArrays * length) {}
  A* array(int64_t k) { return arrays.data() + k * length; }
};

// 1/|x| of the rows and of the columns.
template <class A>
class Norms {
 public:
  explicit Norms(const Similarity& s)
      : rows_(s.rows.count), columns_(s.triangle ? 0 : s.columns.count), triangle_(s.triangle) {
    inverse_norms(s.rows, s.normalize, rows_.data());
    if (!triangle_) inverse_norms(s.columns, s.normalize, columns_.data());
  }
  const A* rows() const { return rows_.data(); }
  const A* columns() const { return triangle_ ? rows_.data() : columns_.data(); }

 private:
  Workspace<A> rows_, columns_;
  bool triangle_;
};

// Calls body(tile, worker) for all tiles of dot products, in the rounds of for_each_pair. sums: it
// adds to the left or to the right.
template <class P, class A = typename P::Scalar, class Body>
void for_each_product(const Similarity& s, const Norms<A>& norms, bool sums, const Body& body) {
  const Blocks rows(s.rows.count, max_threads()), columns(s.columns.count, max_threads());
  std::vector<std::unique_ptr<Worker<P>>> workers(max_threads());
  for_each_pair(rows.count, columns.count, s.triangle, [&](int64_t id, int64_t i, int64_t j) {
    if (!workers[id])
      workers[id] =
          std::make_unique<Worker<P>>(rows.longest(), columns.longest(), s.rows.width, sums);
    Worker<P>& w = *workers[id];
    load_block(s.rows, rows.begin(i), rows.length(i), norms.rows(), w.left);
    load_block(s.columns, columns.begin(j), columns.length(j), norms.columns(), w.right);
    const Blocks down(rows.length(i), 1, kSquare), across(columns.length(j), 1, kSquare);
    for (int64_t r = 0; r < down.count; ++r)
      for (int64_t c = s.triangle && i == j ? r : 0; c < across.count; ++c) {
        const Tile<A> tile{{w.tile.data(), w.tile_stride, down.length(r), across.length(c),
                            down.begin(r), across.begin(c)},
                           rows.begin(i) + down.begin(r),
                           columns.begin(j) + across.begin(c),
                           s.triangle && i == j && r == c};
        P::dots(tile, w.left, w.right);
        for (int64_t k = 0; k < tile.rows; ++k)
          std::fill(tile[k] + tile.columns, tile[k] + w.stride, A(-kInf));
        body(tile, w);
      }
    P::finish();
  });
}

// Below this many multiplications the processor's bfloat16 products do not pay for their packing.
constexpr int64_t kSmallestBFloat16Work = int64_t{1} << 22;

// Calls body with the kind of products that suits the rows.
template <class Body>
void with_products(const Similarity& s, const Body& body) {
  if (s.wide) return body(Products<double>{});
#if defined(__AVX512F__)
  const bool bfloat16 = s.rows.dtype == DType::bf16 && s.columns.dtype == DType::bf16;
  if (bfloat16 && pair_products() != PairProducts::none &&
      double(s.rows.count) * s.columns.count * s.rows.width >= kSmallestBFloat16Work)
    return body(BFloat16Products{});
#endif
  body(Products<float>{});
}

}  // namespace apt::APT_ISA
