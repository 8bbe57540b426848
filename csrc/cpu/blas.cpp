#include "blas.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "isa.h"

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
#define APT_HAS_BRGEMM 1
#endif

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

bool has_bfloat16_products() {
#if defined(APT_HAS_BRGEMM)
  static const bool has = __builtin_cpu_supports("avx512bf16") && isa() == Isa::avx512;
  return has;
#else
  return false;
#endif
}

void multiply_bfloat16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride,
                       const uint32_t* b_pairs, int64_t b_stride, float* out, int64_t out_stride,
                       bool accumulate) {
#if defined(APT_HAS_BRGEMM)
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, out_stride, accumulate,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b_pairs), out);
#else
  (void)m, (void)n, (void)k, (void)a, (void)a_stride, (void)b_pairs, (void)b_stride, (void)out,
      (void)out_stride, (void)accumulate;
#endif
}

void release_bfloat16_products() {
#if defined(APT_HAS_BRGEMM)
  at::native::cpublas::brgemm_release();
#endif
}

}  // namespace apt
