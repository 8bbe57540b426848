#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// APT_KERNELS_ISA=baseline|avx2|avx512|avx512_bf16 asks for less than the processor has (tests run
// all of them).
const char* asked_isa() { return std::getenv("APT_KERNELS_ISA"); }

Isa choose() {
  const Isa best = supported();
  const char* asked = asked_isa();
  if (asked == nullptr) return best;
  const Isa wanted = std::strcmp(asked, "baseline") == 0 ? Isa::baseline
                     : std::strcmp(asked, "avx2") == 0   ? Isa::avx2
                                                         : Isa::avx512;
  return wanted < best ? wanted : best;
}

#if defined(__x86_64__)
// Of cpuid's leaf 7.
bool has_bfloat16_vectors() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
}

// Linux gives a process the tiles' registers when it asks for them.
bool has_bfloat16_tiles() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

PairProducts choose_pair_products() {
#if defined(__x86_64__)
  if (isa() != Isa::avx512 || !has_bfloat16_vectors()) return PairProducts::none;
  if (const char* asked = asked_isa())
    return std::strcmp(asked, "avx512_bf16") == 0 ? PairProducts::vectors : PairProducts::none;
  if (has_bfloat16_tiles()) return PairProducts::tiles;
  // Intel's vectors of pairs take four times as long as its multiply-adds of floats (measured:
  // Emerald Rapids). AMD's are taken because oneDNN reached 490 to 510 of 515 GFlop/s with them.
  if (__builtin_cpu_is("amd")) return PairProducts::vectors;
#endif
  return PairProducts::none;
}

}  // namespace

PairProducts pair_products() {
  static const PairProducts chosen = choose_pair_products();
  return chosen;
}

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
