// bfloat16 matrix products with float32 results: oneDNN's kernels, reached through PyTorch without
// its headers. (at::mm would round the result to bfloat16.)
#pragma once
#include <cstdint>

namespace apt {

// Whether the processor multiplies bfloat16 itself and this PyTorch lends its kernels.
bool has_bfloat16_products();

// out [m, n] (+)= a [m, k] b [k, n], k even. b_pairs [k / 2, n] holds two rows of b in a word, the
// even one in the lower half. Strides are in elements of their arrays.
void multiply_bfloat16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride,
                       const uint32_t* b_pairs, int64_t b_stride, float* out, int64_t out_stride,
                       bool accumulate);

// To be called by a thread after its last product: it gives back the processor's tile registers.
void release_bfloat16_products();

}  // namespace apt
