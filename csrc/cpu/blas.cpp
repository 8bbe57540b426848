#include "blas.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

namespace apt {
namespace {

at::Tensor view(const Matrix& m) {
  const at::ScalarType type = m.dtype == DType::f64    ? at::kDouble
                              : m.dtype == DType::bf16 ? at::kBFloat16
                              : m.dtype == DType::f16  ? at::kHalf
                                                       : at::kFloat;
  return at::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                       at::TensorOptions().dtype(type));
}

}  // namespace

Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.columns, m.rows, m.column_stride, m.row_stride};
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, double beta, double alpha) {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor result = view(out);
  if (beta == 0 && alpha == 1) {
    at::mm_out(result, view(a), view(b));
  } else {
    at::addmm_out(result, result, view(a), view(b), beta, alpha);
  }
}

}  // namespace apt
