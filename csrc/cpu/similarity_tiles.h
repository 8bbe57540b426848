// Tiles of the similarity matrix that stay in the L2 cache: products by the BLAS, or oneDNN's
// bfloat16 kernels where rows are bfloat16 and the processor multiplies them. A product of unit
// rows is exact to the rounding of its sum; bfloat16 rows are multiplied as they are, and the
// products scaled in float. Memory: a tile and two blocks of rows a thread.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "blas.h"
#include "similarity_rows.h"

namespace apt::APT_ISA {

// Rows are loaded in blocks; tiles of two blocks are cut into squares that stay in the L2 cache.
constexpr int64_t kLargestBlock = 512, kSmallestBlock = 64, kSquare = 256;  // rows
constexpr int64_t kBlocksPerThread = 4;

// Blocks of nearly equal length: a last block of a row or two would be summed in another order.
struct Blocks {
  int64_t total, count;
  Blocks(int64_t rows, int64_t threads, int64_t largest = kLargestBlock) : total(rows) {
    const int64_t wanted = threads > 1 ? kBlocksPerThread * threads : 1;
    count = std::max((rows + largest - 1) / largest,
                     std::min(wanted, (rows + kSmallestBlock - 1) / kSmallestBlock));
  }
  // Even, as pairs of bfloat16 rows are multiplied together.
  int64_t begin(int64_t i) const { return i == count ? total : total * i / count / 2 * 2; }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t longest() const { return count ? std::min(total, total / count + 3) : 0; }
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
struct Tile {
  A* data;
  int64_t stride, row, rows, column, columns;
  int64_t left, right;  // where its rows and its columns begin in their blocks
  bool diagonal;        // of a triangle
  A* operator[](int64_t r) const { return data + r * stride; }
  // Calls body(i, j, element) for the elements of the matrix with j = i + offset in this tile.
  template <class Body>
  void along(int64_t offset, const Body& body) const {
    const int64_t end = std::min(row + rows, column + columns - offset);
    for (int64_t i = std::max(row, column - offset); i < end; ++i)
      body(i, i + offset, data[(i - row) * stride + i + offset - column]);
  }
};

// Products of unit rows in float or double.
template <class A>
struct UnitProducts {
  using Scalar = A;
  static constexpr DType kType = sizeof(A) == 8 ? DType::f64 : DType::f32;
  struct Block {
    Workspace<A> unit;
    int64_t width;
    Block(int64_t longest, int64_t w) : unit(longest * w), width(w) {}
    void load(const Rows& rows, int64_t first, int64_t n, const A* inverse) {
      load_rows(rows, first, n, inverse, unit.data());
    }
    Matrix part(int64_t begin, int64_t size) const {
      return {const_cast<A*>(unit.data()) + begin * width, kType, size, width, width, 1};
    }
  };
  struct Scratch {
    explicit Scratch(int64_t) {}
  };
  static Matrix matrix(const Tile<A>& t) { return {t.data, kType, t.rows, t.columns, t.stride, 1}; }
  static void similarities(const Tile<A>& t, const Block& left, const Block& right) {
    multiply(matrix(t), left.part(t.left, t.rows), transposed(right.part(t.right, t.columns)));
  }
  static void add_to_rows(A* out, const Tile<A>& t, const Block& right, Scratch&) {
    multiply({out, kType, t.rows, right.width, right.width, 1}, matrix(t),
             right.part(t.right, t.columns), 1);
  }
  static void add_to_columns(A* out, const Tile<A>& t, const Block& left, Scratch&) {
    multiply({out, kType, t.columns, left.width, left.width, 1}, transposed(matrix(t)),
             left.part(t.left, t.rows), 1);
  }
  static void finish() {}
};

// The memory of one thread: two blocks of rows, their tile, and kArrays arrays as long as a side.
template <class P>
struct Worker {
  using A = typename P::Scalar;
  static constexpr int64_t kArrays = 10;
  int64_t stride, length;
  typename P::Block left, right;
  typename P::Scratch scratch;
  Workspace<A> tile, arrays;
  Worker(int64_t rows, int64_t columns, int64_t width)
      : stride(round_up(std::min(columns, kSquare), Lanes<A>::kCount)),
        length(std::max(stride, round_up(std::min(rows, kSquare), Lanes<A>::kCount))),
        left(rows, width),
        right(columns, width),
        scratch(length),
        tile(length * stride),
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

// Calls body(tile, worker) for all tiles of dot products, in the rounds of for_each_pair.
template <class P, class A = typename P::Scalar, class Body>
void for_each_product(const Similarity& s, const Norms<A>& norms, const Body& body) {
  const Blocks rows(s.rows.count, max_threads()), columns(s.columns.count, max_threads());
  std::vector<std::unique_ptr<Worker<P>>> workers(max_threads());
  for_each_pair(rows.count, columns.count, s.triangle, [&](int64_t id, int64_t i, int64_t j) {
    if (!workers[id])
      workers[id] = std::make_unique<Worker<P>>(rows.longest(), columns.longest(), s.rows.width);
    Worker<P>& w = *workers[id];
    w.left.load(s.rows, rows.begin(i), rows.length(i), norms.rows());
    w.right.load(s.columns, columns.begin(j), columns.length(j), norms.columns());
    const Blocks down(rows.length(i), 1, kSquare), across(columns.length(j), 1, kSquare);
    for (int64_t r = 0; r < down.count; ++r)
      for (int64_t c = s.triangle && i == j ? r : 0; c < across.count; ++c) {
        const Tile<A> tile{w.tile.data(),
                           w.stride,
                           rows.begin(i) + down.begin(r),
                           down.length(r),
                           columns.begin(j) + across.begin(c),
                           across.length(c),
                           down.begin(r),
                           across.begin(c),
                           s.triangle && i == j && r == c};
        P::similarities(tile, w.left, w.right);
        for (int64_t k = 0; k < tile.rows; ++k)
          std::fill(tile[k] + tile.columns, tile[k] + w.stride, A(-kInf));
        body(tile, w);
      }
    P::finish();
  });
}

}  // namespace apt::APT_ISA
