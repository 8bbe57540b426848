// Element types of the CPU kernels. Torch-free: a kernel sees pointers, sizes and a DType.
#pragma once
#include <cstdint>

namespace apt {

enum class DType { f32, bf16, f16, f64 };
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace apt
