// Matrix products for the CPU kernels: PyTorch's own BLAS, reached without its headers.
#pragma once
#include <cstdint>

#include "common/types.h"

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

// Products by oneDNN's kernels, which PyTorch lends to callers that pack their operands: of floats,
// and of bfloat16 with float32 results. (at::mm would round those to bfloat16.) Whether this
// PyTorch has them for the instruction set in use; bfloat16: and the processor multiplies it.
bool has_packed_products(DType dtype);

// out [m, n] (+)= a [m, k] b [k, n]. Strides are in elements of their arrays.
void multiply_float(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride,
                    const float* b, int64_t b_stride, float* out, int64_t out_stride,
                    bool accumulate);
// k even. b_pairs [k / 2, n] holds two rows of b in a word, the even one in the lower half.
void multiply_bfloat16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride,
                       const uint32_t* b_pairs, int64_t b_stride, float* out, int64_t out_stride,
                       bool accumulate);

// To be called by a thread after its last product: it gives back the processor's tile registers.
void release_packed_products();

}  // namespace apt
