// The similarities of all pairs of rows, s_ij = u_i . v_j / temperature, as the contrastive losses
// see them: never whole, a tile at a time. Pointers and sizes only; similarity_tiles.h computes.
#pragma once
#include <cstdint>
#include <limits>

#include "common/types.h"

namespace apt {

// The rows of a matrix, or of two on top of each other; strides in elements.
struct Rows {
  DType dtype;
  int64_t count, width;
  int64_t first_count;  // rows of the first matrix
  const void* data[2];
  int64_t row_stride[2], column_stride[2];
};

constexpr int64_t kNowhere = std::numeric_limits<int64_t>::min() / 4;

struct Similarity {
  Rows rows, columns;
  bool wide;       // compute in double
  bool triangle;   // columns are the rows: only one of (i, j) and (j, i) is computed
  bool normalize;  // u = x / |x|, 0 for |x|^2 <= 1e-24, NaN where |x|^2 is not finite
  double scale;    // 1 / temperature
  bool unrounded;  // gradients have the type of their sums and not that of the rows
  // The column that is excluded from row i is i + self_offset; the one that is its positive
  // i + label_offset. Columns beyond the matrix, and kNowhere: none.
  int64_t self_offset, label_offset;
};

}  // namespace apt
