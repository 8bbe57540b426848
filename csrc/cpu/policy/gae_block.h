// The recurrence of advantages over the kLanes consecutive steps of one vector.
#pragma once
#include <utility>

#include "common/simd.h"

namespace apt::APT_ISA {

// Lane i of the result is lane i + k of x; past its end, of `after`.
template <int k, class V, int... i>
inline V shift_lanes(V x, V after, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, after, (i + k)...);
}
template <int k, class V>
inline V shift(V x, V after) {
  return shift_lanes<k>(x, after, std::make_integer_sequence<int, kLanes>());
}

// Calls step(integral_constant k) for k = 1, 2, 4, ... below kLanes: the steps of a prefix scan.
template <int k = 1, class Step>
inline void for_powers_of_two(const Step& step) {
  step(std::integral_constant<int, k>());
  if constexpr (2 * k < kLanes) for_powers_of_two<2 * k>(step);
}

// Booleans in memory as lanes of all bits or none.
inline VecI load_flags(const bool* p) {
  using VecU8 = uint8_t __attribute__((vector_size(kLanes)));
  VecU8 raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, VecI) != 0;
}
template <class Word>
inline bool all_bytes(const bool* p, Word pattern) {
  Word difference = 0;
  for (size_t i = 0; i < kLanes; i += sizeof(Word)) {
    Word word;
    std::memcpy(&word, p + i, sizeof word);
    difference |= word ^ pattern;
  }
  return difference == 0;
}
inline bool all_true(const bool* p) { return all_bytes(p, 0x01010101u); }
inline bool all_false(const bool* p) { return all_bytes(p, 0u); }

// What a block hands to the one before it.
struct BlockCarry {
  float advantage, value;
  bool any;  // whether a later step counts
};
struct BlockResult {
  VecF advantages, returns;
};
struct BlockFlags {
  VecI counts, ends, breaks;
  VecF after_break, after_last;  // the next value of a step that is truncated, or the last
};

// decay^1, ^2, ^4 ... for the steps of the scan, and decay^(kLanes - i) for the carry.
struct Powers {
  float of_step[kLanes];
  VecF of_carry;
  explicit Powers(float decay) {
    double power = decay;
    for (int i = 0; i < kLanes; ++i, power *= decay) {
      of_step[i] = float(power);
      of_carry[kLanes - 1 - i] = float(power);
    }
  }
};

// A block in which every step counts and none is flagged, and a later step counts.
inline BlockResult scan_plain(VecF rewards, VecF values, float gamma, const Powers& powers,
                              BlockCarry& carry) {
  VecF a = rewards + gamma * shift<1>(values, splat(carry.value)) - values;
  for_powers_of_two([&](auto k) { a = a + powers.of_step[k - 1] * shift<k>(a, VecF{}); });
  a = a + powers.of_carry * splat(carry.advantage);
  carry.advantage = a[0];
  carry.value = values[0];
  return {a, a + values};
}

// a + p x. A factor of 0 cuts: what lies behind may be anything.
inline VecF after(VecF p, VecF a, VecF x) { return select(p == 0.f, a, a + p * x); }

// Any block. The trace is a scan of maps x -> a + p x, the next value one of "first that counts".
inline BlockResult scan_flagged(VecF rewards, VecF values, const BlockFlags& flags, float gamma,
                                float decay, BlockCarry& carry) {
  const VecF zero = {}, one = splat(1.f);
  const VecI counts = flags.counts, none = {};
  const VecF r = select(counts, rewards, zero), v = select(counts, values, zero);
  VecF next = shift<1>(v, splat(carry.value));
  VecI any = shift<1>(counts, carry.any ? VecI{} - 1 : VecI{});
  for_powers_of_two([&](auto k) {
    next = select(any, next, shift<k>(next, zero));
    any |= shift<k>(any, none);
  });
  const VecF next_value =
      select(any, select(flags.breaks, flags.after_break, next), flags.after_last);
  const VecF delta = r + gamma * select(flags.ends, zero, next_value) - v;
  const VecI cut = flags.ends | flags.breaks | ~any;
  VecF a = select(counts, delta, zero);
  VecF p = select(counts, select(cut, zero, splat(decay)), one);
  for_powers_of_two([&](auto k) {
    a = after(p, a, shift<k>(a, zero));
    p = p * shift<k>(p, one);
  });
  a = after(p, a, splat(carry.advantage));
  carry.advantage = a[0];
  carry.value = counts[0] ? v[0] : next[0];
  carry.any = counts[0] || any[0];
  return {select(counts, a, zero), select(counts, a + v, zero)};
}

}  // namespace apt::APT_ISA
