// The instruction set chosen at load, and the call of a kernel compiled for it.
#pragma once

namespace apt {

enum class Isa { baseline, avx2, avx512 };
Isa isa();
const char* isa_name();

// How the processor multiplies bfloat16 best: as floats, by vectors of pairs (AVX512-BF16) or by
// tiles of them (AMX).
enum class PairProducts { none, vectors, tiles };
PairProducts pair_products();

}  // namespace apt

// Declares a kernel of one signature in the namespace of every instruction set.
#if defined(__x86_64__)
#define APT_DECLARE_KERNEL(result, name, ...) \
  namespace apt::baseline {                   \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace apt::avx2 {                       \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace apt::avx512 {                     \
  result name(__VA_ARGS__);                   \
  }
#define APT_CALL_KERNEL(name, ...)                                 \
  (apt::isa() == apt::Isa::avx512 ? apt::avx512::name(__VA_ARGS__) \
   : apt::isa() == apt::Isa::avx2 ? apt::avx2::name(__VA_ARGS__)   \
                                  : apt::baseline::name(__VA_ARGS__))
#else
#define APT_DECLARE_KERNEL(result, name, ...) \
  namespace apt::baseline {                   \
  result name(__VA_ARGS__);                   \
  }
#define APT_CALL_KERNEL(name, ...) (apt::baseline::name(__VA_ARGS__))
#endif
