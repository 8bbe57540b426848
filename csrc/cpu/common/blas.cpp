#include "common/blas.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "common/isa.h"

#if defined(__x86_64__)
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

#if defined(APT_HAS_BRGEMM)
// A call adds one product after the other. Sums in blocks of k are as exact as the BLAS' or better
// (at k = 576 their error is 1 / 2.7 of that without) and cost 4 %.
constexpr int64_t kSumBlock = 64, kPairedSumBlock = 128;
// A block of the right factor, so many rows and columns, stays in the first cache while the left
// one passes it: 490 to 510 of 515 GFlop/s a core, without 450 to 490 (float32 gains nothing).
constexpr int64_t kPairedColumns = 64;

// Asked by a product: oneDNN may have been told to use less of the processor (ONEDNN_MAX_CPU_ISA).
template <class T>
bool lends() {
  constexpr int64_t kSize = 16;
  const std::vector<T> factor(kSize * kSize, T(1));
  std::vector<float> out(kSize * kSize);
  try {
    at::native::cpublas::brgemm(kSize, kSize, kSize, kSize, kSize, kSize, false, factor.data(),
                                factor.data(), out.data());
    at::native::cpublas::brgemm_release();
  } catch (const c10::Error&) {
    return false;
  }
  return out.back() == float(kSize);
}
#endif

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

bool has_packed_products(DType dtype) {
#if defined(APT_HAS_BRGEMM)
  static const bool floats = isa() == Isa::avx512 && lends<float>();
  static const bool bfloat16 =
      floats && __builtin_cpu_supports("avx512bf16") && lends<at::BFloat16>();
  return at::globalContext().userEnabledMkldnn() && (dtype == DType::bf16 ? bfloat16 : floats);
#else
  (void)dtype;
  return false;
#endif
}

void multiply_float(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride,
                    const float* b, int64_t b_stride, float* out, int64_t out_stride,
                    bool accumulate) {
#if defined(APT_HAS_BRGEMM)
  for (int64_t i = 0; i < k; i += kSumBlock)
    at::native::cpublas::brgemm(m, n, std::min(kSumBlock, k - i), a_stride, b_stride, out_stride,
                                accumulate || i > 0, a + i, b + i * b_stride, out);
#else
  (void)m, (void)n, (void)k, (void)a, (void)a_stride, (void)b, (void)b_stride, (void)out,
      (void)out_stride, (void)accumulate;
#endif
}

void multiply_bfloat16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride,
                       const uint32_t* b_pairs, int64_t b_stride, float* out, int64_t out_stride,
                       bool accumulate) {
#if defined(APT_HAS_BRGEMM)
  for (int64_t j = 0; j < n; j += kPairedColumns)
    for (int64_t i = 0; i < k; i += kPairedSumBlock)
      at::native::cpublas::brgemm(
          m, std::min(kPairedColumns, n - j), std::min(kPairedSumBlock, k - i), a_stride, b_stride,
          out_stride, accumulate || i > 0, reinterpret_cast<const at::BFloat16*>(a + i),
          reinterpret_cast<const at::BFloat16*>(b_pairs + i / 2 * b_stride + j), out + j);
#else
  (void)m, (void)n, (void)k, (void)a, (void)a_stride, (void)b_pairs, (void)b_stride, (void)out,
      (void)out_stride, (void)accumulate;
#endif
}

void release_packed_products() {
#if defined(APT_HAS_BRGEMM)
  at::native::cpublas::brgemm_release();
#endif
}

}  // namespace apt
