// Matrix products for the CPU kernels: PyTorch's own BLAS, reached without its headers.
#pragma once
#include <cstdint>

#include "types.h"

namespace apt {

// A matrix in row-major or column-major memory: element (i, j) at data[i * row + j * column].
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, columns, row_stride, column_stride;
};
Matrix transposed(const Matrix& m);

// out = beta * out + alpha * a b. All three of one dtype.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, double beta = 0,
              double alpha = 1);

}  // namespace apt
