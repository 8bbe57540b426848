#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace apt {
namespace {

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

// APT_KERNELS_ISA=baseline|avx2 asks for less than the processor has (tests run all of them).
Isa choose() {
  const Isa best = supported();
  const char* asked = std::getenv("APT_KERNELS_ISA");
  if (asked == nullptr) return best;
  const Isa wanted = std::strcmp(asked, "baseline") == 0 ? Isa::baseline
                     : std::strcmp(asked, "avx2") == 0   ? Isa::avx2
                                                         : Isa::avx512;
  return wanted < best ? wanted : best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

}  // namespace apt
