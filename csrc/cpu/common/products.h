// Products of blocks of rows, as the losses over an output head and the contrastive losses need
// them. With left [m, width], right [n, width] and coefficients c [m, n] of their rows:
//   dots          c = left right^T
//   add_to_left   out [m, width] (+)= c right
//   add_to_right  out [n, width] (+)= c^T left
// One type for each way of multiplying: BlasProducts here, those by oneDNN's kernels in
// packed_products.h. Each has Scalar, the type of the coefficients and sums; Element, that of the
// rows; Block, rows in the forms its products read; Scratch; kTileColumns, the size of right blocks
// that multiplies fastest.
#pragma once
#include <algorithm>

#include "common/blas.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/workspace.h"

namespace apt::APT_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Of the rows [left, left + rows) of one block and [right, right + columns) of another; a begin
// other than 0 is even.
template <class A>
struct Coefficients {
  A* data;
  int64_t stride, rows, columns, left, right;
  A* operator[](int64_t r) const { return data + r * stride; }
};

// The right block of dots; one of whose rows sums are taken.
struct Uses {
  bool right_of_dots, sums;
};

// Rows side by side: in their own memory, where room() lets them be written, or where they lie.
template <class E>
struct RowBlock {
  int64_t longest, width, stride;
  const E* rows = nullptr;
  Workspace<E> own;
  RowBlock(int64_t most, int64_t w, int64_t s) : longest(most), width(w), stride(s) {}
  E* room() {
    if (own.size() == 0) own.allocate(longest * stride);
    return own.data();
  }
};

template <class A>
struct BlasProducts {
  using Scalar = A;
  using Element = A;
  static constexpr DType kType = sizeof(A) == 8 ? DType::f64 : DType::f32;
  // Measured, 1 core with 1 MiB of L2: products of 256 rows and 512 columns reach 96 % of the
  // BLAS' peak, a call with 15261 columns 51 %.
  static constexpr int64_t kTileColumns = 512;

  struct Block : RowBlock<A> {
    Block(int64_t most, int64_t w, Uses) : RowBlock<A>(most, w, w) {}
    void use(const A* data, int64_t) { this->rows = data; }
    Matrix part(int64_t begin, int64_t size) const {
      return {const_cast<A*>(this->rows) + begin * this->width,
              kType,
              size,
              this->width,
              this->width,
              1};
    }
  };
  struct Scratch {
    Scratch(int64_t, int64_t) {}
  };

  static Matrix matrix(const Coefficients<A>& c) {
    return {c.data, kType, c.rows, c.columns, c.stride, 1};
  }
  static void dots(const Coefficients<A>& c, const Block& left, const Block& right,
                   bool accumulate) {
    multiply(matrix(c), left.part(c.left, c.rows), transposed(right.part(c.right, c.columns)),
             accumulate);
  }
  static void add_to_left(A* out, const Coefficients<A>& c, const Block& right, Scratch&,
                          bool accumulate) {
    multiply({out, kType, c.rows, right.width, right.width, 1}, matrix(c),
             right.part(c.right, c.columns), accumulate);
  }
  static void add_to_right(A* out, const Coefficients<A>& c, const Block& left, Scratch&,
                           bool accumulate) {
    multiply({out, kType, c.columns, left.width, left.width, 1}, transposed(matrix(c)),
             left.part(c.left, c.rows), accumulate);
  }
  static void finish() {}
};

}  // namespace apt::APT_ISA
