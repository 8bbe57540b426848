// Squares of kLanes x kLanes words, transposed in registers.
#pragma once
#include <algorithm>
#include <utility>

#include "common/simd.h"

namespace apt::APT_ISA {

// Of the words of two vectors (the second one's count on from kLanes), which one lane i takes.
struct LowWords {  // 0 and 1 of each quarter, one vector's and the other's in turn
  static constexpr uint32_t at(uint32_t i) { return i % 2 * kLanes + i / 4 * 4 + i % 4 / 2; }
};
struct HighWords {  // 2 and 3
  static constexpr uint32_t at(uint32_t i) { return LowWords::at(i) + 2; }
};
struct LowPairs {  // 0 and 1 of each quarter, of one vector and then of the other
  static constexpr uint32_t at(uint32_t i) { return i % 4 / 2 * kLanes + i / 4 * 4 + i % 2; }
};
struct HighPairs {  // 2 and 3
  static constexpr uint32_t at(uint32_t i) { return LowPairs::at(i) + 2; }
};
struct EvenQuarters {  // of one vector and then of the other
  static constexpr uint32_t at(uint32_t i) { return i / 4 * 8 + i % 4; }
};
struct OddQuarters {
  static constexpr uint32_t at(uint32_t i) { return EvenQuarters::at(i) + 4; }
};

template <class Lane, uint32_t... i>
inline VecU shuffle(VecU a, VecU b, std::integer_sequence<uint32_t, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane::at(i)...);
#else
  return __builtin_shuffle(a, b, VecU{Lane::at(i)...});
#endif
}
template <class Lane>
inline VecU shuffle(VecU a, VecU b) {
  return shuffle<Lane>(a, b, std::make_integer_sequence<uint32_t, kLanes>{});
}

// Words and pairs of words within quarters, then the quarters.
inline void transpose(VecU* w) {
  VecU v[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    v[i] = shuffle<LowWords>(w[i], w[i + 1]);
    v[i + 1] = shuffle<HighWords>(w[i], w[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4)
    for (int k = 0; k < 2; ++k) {
      w[i + 2 * k] = shuffle<LowPairs>(v[i + k], v[i + 2 + k]);
      w[i + 2 * k + 1] = shuffle<HighPairs>(v[i + k], v[i + 2 + k]);
    }
  constexpr int kQuarters = kLanes / 4;
  if constexpr (kQuarters == 2) {
    for (int k = 0; k < 4; ++k) {
      v[k] = shuffle<EvenQuarters>(w[k], w[4 + k]);
      v[4 + k] = shuffle<OddQuarters>(w[k], w[4 + k]);
    }
    for (int k = 0; k < kLanes; ++k) w[k] = v[k];
  }
  if constexpr (kQuarters == 4) {
    for (int half = 0; half < 16; half += 8)
      for (int k = 0; k < 4; ++k) {
        v[half + k] = shuffle<EvenQuarters>(w[half + k], w[half + 4 + k]);
        v[half + 4 + k] = shuffle<OddQuarters>(w[half + k], w[half + 4 + k]);
      }
    for (int k = 0; k < 8; ++k) {
      w[k] = shuffle<EvenQuarters>(v[k], v[8 + k]);
      w[k + 8] = shuffle<OddQuarters>(v[k], v[8 + k]);
    }
  }
}

// A vector of words, or the first `count` of one and zeros.
template <class V = VecU, class E>
inline V load_words(const E* p, int64_t count) {
  V words{};
  if (count >= kLanes) {
    std::memcpy(&words, p, sizeof words);
  } else {
    std::memcpy(&words, p, size_t(count) * sizeof(uint32_t));
  }
  return words;
}

// Calls store(r, c, words) for the transposed words [rows, columns]: column c of the kLanes rows
// from r on. word(r, c, count) gives the row's words from c on, of which `count` matter; rows up
// to `padded` are zeros.
template <class Word, class Store>
inline void transpose_words(int64_t rows, int64_t padded, int64_t columns, const Word& word,
                            const Store& store) {
  for (int64_t r = 0; r < padded; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, columns - c);
      VecU words[kLanes];
      for (int k = 0; k < kLanes; ++k) words[k] = r + k < rows ? word(r + k, c, count) : VecU{};
      transpose(words);
      for (int64_t k = 0; k < count; ++k) store(r, c + k, words[k]);
    }
}

}  // namespace apt::APT_ISA
