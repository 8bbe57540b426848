// A product of two matrices, as the micro-kernels of every instruction set take it.
#pragma once
#include <cstdint>

namespace apt {

// Called for rows of the result as soon as they are complete, while they are in the first cache.
struct RowsDone {
  void (*call)(const void* state, int64_t first, int64_t count) = nullptr;
  const void* state = nullptr;
};

// out [m, n] (+)= a [m, k] b [k, n]. Element (i, k) of a lies at a[i * a_row + k * a_step], one of
// which is 1. b lies in panels of columns, each filled up: one after the other, or side by side.
// How a sum is rounded depends on k alone: neither on m nor on n nor on the element's place.
template <class Word, class Sum = Word>
struct PanelProduct {
  int64_t m, n, k;
  const Word* a;
  int64_t a_row, a_step;
  const Word* b;
  int64_t b_panel, b_step;  // words from one panel to the next, from one k to the next
  Sum* out;
  int64_t out_stride;
  bool accumulate;
  RowsDone done{};
};

}  // namespace apt
