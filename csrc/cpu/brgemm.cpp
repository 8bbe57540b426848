#include "brgemm.h"

#include <ATen/native/CPUBlas.h>

#include "isa.h"

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
#define APT_HAS_BRGEMM 1
#endif

namespace apt {

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
