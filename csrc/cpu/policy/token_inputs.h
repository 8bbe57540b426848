// What the bindings and the kernels of losses of tokens share.
#pragma once
#include <cstdint>

#include "apt/codes.h"

namespace apt {

// Rows of adjacent elements, or one element a row (step 0); null: the argument is absent.
struct TokenInput {
  const void* data;
  int64_t row, step;
};

// [rows, length] tokens, those that count, and how their losses become one number.
struct Tokens {
  int64_t rows, length;
  const bool* mask;
  int64_t mask_row;  // stride
  Aggregation aggregation;
  double normalizer;  // 0: the denominator of the aggregation
};

}  // namespace apt
