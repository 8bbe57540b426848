#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace apt {

// Element (row, step) of a tensor is data[row * row + step * step]; null: the argument is absent.
struct GaeInput {
  const void* data;
  int64_t row, step;
};

struct Gae {
  DType dtype;                // of rewards and values
  int64_t rows, length;       // packed sequences: their number and the sum of lengths
  const int64_t* cu_seqlens;  // [rows + 1]: sequences packed in one row; null: rows
  GaeInput rewards, values;
  GaeInput mask, terminated, truncated;  // bool; true counts
  GaeInput bootstrap;                    // float, or double for float64
  bool bootstrap_per_step;               // else one a row
  double gamma, gae_lambda;
  bool whiten;
  const bool* flat_mask;       // for whitening: laid out as the results; null: all count
  int64_t out_row, out_step;   // strides of the results, which are contiguous
  void *advantages, *returns;  // float, or double for float64
};

}  // namespace apt

APT_DECLARE_KERNEL(void, gae_fwd, const apt::Gae&)
